"""The pictures of a run."""

from pathlib import Path

import pytest

from benchmarks.showing import plots, report
from tests.benchmarks.small import LIMITS, records

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
