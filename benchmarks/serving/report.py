"""The measurements as tables. Needs no vLLM."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.serving.labels import LABELS, MODEL

BASE_OF = {"lmoe": "base", "lora": "base", "lmoe-eager": "base-eager", "lora-eager": "base-eager"}
_PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def costs(speeds: Mapping[str, Sequence[float]], row: str) -> list[float]:
    """How many times the base's time a row takes, round by round. The base is compiled or eager, as the row is."""
    base = speeds.get(BASE_OF.get(row, ""), ())
    return [of_base / of_row for of_base, of_row in zip(base, speeds[row], strict=False)]


def markdown(results: Mapping[str, Any]) -> str:
    """All tables, with what accompanies them."""
    facts = results["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    lines = [
        "# Serving with vLLM",
        "",
        f"{facts['device']}; {facts['threads']} thread(s) an engine; {packages};"
        f" {facts['system']}; commit {facts['commit']}; {facts['date']};"
        f" load of the machine {facts['load']} at the start, {results['load_at_end']} at the end.",
        "",
        f"The model: {MODEL}. Every engine is a process of its own and stays loaded. In each of {results['rounds']} rounds"
        " every engine measures once, one after the other. Tokens a second: the median of the rounds, and the lowest and the"
        " highest. In a decode, a round is the median of its steps.",
        "",
    ]
    if facts["on_cpu"]:
        lines += [
            "**These are figures of a CPU.** Of CPU time: what the speed would be if the process had a core for itself."
            " vLLM's LoRA on a CPU is a fallback that gathers A and B for each token, and runs in eager mode only: its rows"
            " say nothing about vLLM's kernels for GPUs.",
            "",
        ]
    for clock, title in (("cpu", "Of CPU time"), ("wall", "Of the wall clock")):
        if clock == "cpu" and not facts["on_cpu"]:
            continue
        lines += [f"## {title}", "", *_speeds(results["speeds"], clock), ""]
    lines += [*_latencies(results["latencies"], results["load_of_server"]), "## Checked before", "", *results["checks"], ""]
    return "\n".join(lines)


def _speeds(speeds: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], clock: str) -> list[str]:
    """Tokens a second of each row, and the cost as a multiple of the base's time."""
    lines = [f"| tokens/s | {' | '.join(speeds)} |", f"|---{'|---' * len(speeds)}|"]
    for row, label in LABELS.items():
        cells = []
        for of_rows in speeds.values():
            by_row = {name: clocks[clock] for name, clocks in of_rows.items()}
            cells.append(_cell(by_row, row) if by_row.get(row) else "")
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _cell(speeds: Mapping[str, Sequence[float]], row: str) -> str:
    values = speeds[row]
    text = f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
    if found := costs(speeds, row):
        text += f", {statistics.median(found):.2f}x"
    return text


def _latencies(latencies: Mapping[str, Mapping[str, Sequence[float]]], load: str) -> list[str]:
    if not latencies:
        return []
    kinds = next(iter(latencies.values()))
    columns = [f"{kind} p{percent}" for kind in kinds for percent in _PERCENTILES]
    lines = [
        "## Latency over HTTP",
        "",
        load,
        "",
        f"| ms | requests | {' | '.join(columns)} |",
        f"|---|---{'|---' * len(columns)}|",
    ]
    for row, by_kind in latencies.items():
        cells = [f"{1e3 * percentile(values, p):.3g}" for values in by_kind.values() for p in _PERCENTILES]
        count = len(by_kind["first token"])
        lines.append(f"| {LABELS[row]} | {count} | {' | '.join(cells)} |")
    return [*lines, ""]
