"""The pictures of a run."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.showing import plots, report
from tests.benchmarks.small import LIMITS, SMALL, records

pytest.importorskip("matplotlib")


def test_a_row_that_two_tables_hold_has_one_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are compiled are measured in a table of their own, next to some of the others."""
    several, again = (list(records(names).values()) for names in (["frozen", "torch", "eager"], ["frozen", "torch"]))
    results = report.make_results({"device": "a device"}, LIMITS, "", [*several, *again], [], "")
    drawn, bars = [], plots._bars

    def seen(axis, shown, *arguments) -> None:
        drawn.append(sorted(record["row"] for record in shown))
        bars(axis, shown, *arguments)

    monkeypatch.setattr(plots, "_bars", seen)
    assert {path.name for path in plots.draw(results, tmp_path)} == {"peers.png", "memory.png"}
    assert drawn == [["eager", "torch"]] * len(drawn) != []


def test_bars_of_different_layers_name_their_sizes() -> None:
    few, many = replace(SMALL, tokens=2, in_features=32), SMALL
    pictured = [
        asdict(record)
        for shape, phase in ((few, "forward"), (many, "forward+backward"))
        for record in records(["frozen", "torch"], shape, phase=phase).values()
    ]
    figure = plots._peers(pictured, "a device")
    assert figure is not None
    titles = [axis.get_title(loc="center") or axis.get_title(loc="left") for axis in figure.axes]
    assert [("24 → 40" in title, "32 → 40" in title) for title in titles] == [(True, False), (False, True)]
    assert "→" not in figure.get_suptitle()
    same = plots._peers(pictured[2:], "a device")
    assert same is not None
    assert "24 → 40" in same.get_suptitle()
