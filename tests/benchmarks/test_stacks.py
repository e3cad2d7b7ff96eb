"""What the benchmark of stacks counts: x and its gradient are passed over as often as docs/stacked.md says."""

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.inspect import stacks


@pytest.mark.parametrize("features", [(8, 8), (24, 8, 40)], ids=str)
def test_passes(features: tuple[int, ...]) -> None:
    n = len(features)
    separate = {"x, forward": 3 * n, "x, backward": 2 * n, "dx": 5 * n + 3 * (n - 1)}
    assert stacks.passes(features, "separate", tokens=6, hidden=16) == separate
    stacked = {"x, forward": n + 2, "x, backward": 1, "dx": 2 * n + 1}
    assert stacks.passes(features, "stacked", tokens=6, hidden=16) == stacked


def test_the_whole_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, size in (("HIDDEN", 2048), ("OF_KEYS", 64), ("BETWEEN", 48)):
        monkeypatch.setattr(stacks, name, size)
    monkeypatch.setattr(stacks, "GROUPS", {"q, k, v": (8, 8, 8)})
    monkeypatch.setattr(stacks, "host_microseconds", partial(stacks.host_microseconds, seconds=0))
    stacks.main(["--rounds", "2", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passes"]["q, k, v"]["stacked"]["x, backward"] == 1
    under_autocast = found["saved"]["fp32 under autocast"]
    assert under_autocast["stacked"]["a token"] < under_autocast["separate"]["a token"]
    assert "CPU time of seven layers" in capsys.readouterr().out
