"""Compare two runs: `python -m benchmarks.showing.compare before.json after.json`.

A row counts as changed where its time and its ratio to the frozen linear have both left their spread, in the same direction
and by more than the threshold. The spread covers all visits of a run: times drift between visits by more than the rounds of
one visit differ. A busy machine changes the times alone, a disturbance of the frozen linear changes the ratios alone.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.showing.report import Results, load, shape_of

Spread = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One row in two runs."""

    name: str
    time: float  # after over before, minus one
    ratio: float | None  # the same of the ratio to the frozen linear; None where there is none
    spread: float  # half of its spread over its median: the wider of the two runs
    beyond: bool  # whether it left the spread and the threshold


def compare(before: Results, after: Results, threshold: float) -> list[Change]:
    """Every row that both runs have timed, in the order of the second."""
    old = {_key(record): record for record in _timed(before)}
    return [_change(old[_key(record)], record, threshold) for record in _timed(after) if _key(record) in old]


def main(arguments: list[str] | None = None) -> int:
    """Print the rows that differ; 1 where one of them became slower."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.showing.compare",
        description="Compare two runs; exits with 1 where a row became slower beyond the threshold.",
        epilog="example: python -m benchmarks.showing.compare before/results.json after/results.json --threshold 0.05",
    )
    parser.add_argument("before", type=Path, help="results.json of the first run")
    parser.add_argument("after", type=Path, help="results.json of the second run")
    parser.add_argument("--threshold", type=float, default=0.1, help="the least change that counts (default 0.1: 10 %%)")
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.before), load(options.after)
    except ValueError as error:
        parser.error(str(error))
    if before["environment"]["device"] != after["environment"]["device"]:
        print(f"note: two devices, {before['environment']['device']} and {after['environment']['device']}")
    changes = compare(before, after, options.threshold)
    beyond = sorted((change for change in changes if change.beyond), key=lambda change: -change.time)
    for change in beyond:
        ratio = "" if change.ratio is None else f", over the frozen linear {change.ratio:+.1%}"
        print(f"{change.name}: time {change.time:+.1%}{ratio}, spread {change.spread:.1%}")
    missing = len(_timed(before)) - len(changes)
    print(
        f"{len(changes)} rows compared, {len(beyond)} beyond their spread and {options.threshold:.0%}; "
        f"{missing} of the first run are not in the second"
    )
    return int(any(change.time > 0 for change in beyond))


def _timed(results: Results) -> list[dict[str, Any]]:
    return [record for record in (*results["records"], *results["models"]) if record["seconds"] is not None]


def _key(record: dict[str, Any]) -> str:
    """The name of a row; two records of the same name are compared."""
    if "shape" not in record:
        return f"whole model, {record['phase']}: {record['row']}"
    launch = ", graph" if record["launch"] == "graph" else ""
    return f"{shape_of(record)}, {record['scope']}, {record['phase']}{launch}: {record['row']}"


def _change(old: dict[str, Any], new: dict[str, Any], threshold: float) -> Change:
    time, time_beyond = _compare(old["seconds"], new["seconds"], threshold)
    ratio, ratio_beyond = None, time_beyond
    if old["over_frozen"] is not None and new["over_frozen"] is not None and new["row"] != "frozen":
        ratio, ratio_beyond = _compare(old["over_frozen"], new["over_frozen"], threshold)
    beyond = time_beyond and ratio_beyond and (ratio is None or (ratio > 0) == (time > 0))
    spread = max((high - low) / 2 / median for low, median, high in map(_reach, (old["seconds"], new["seconds"])))
    return Change(_key(new), time, ratio, spread, beyond and new["row"] != "frozen")


def _compare(old: Spread, new: Spread, threshold: float) -> tuple[float, bool]:
    """The change of a median, and whether it is beyond the threshold and the two spreads do not overlap."""
    (old_low, before, old_high), (new_low, after, new_high) = _reach(old), _reach(new)
    change = after / before - 1
    return change, (new_low > old_high or new_high < old_low) and abs(change) > threshold


def _reach(spread: Spread) -> tuple[float, float, float]:
    """Low end, median and high end of a spread: the ends are the percentiles, or the visits where these lie further out."""
    return min(spread["low"], *spread["visits"]), spread["median"], max(spread["high"], *spread["visits"])


if __name__ == "__main__":
    sys.exit(main())
