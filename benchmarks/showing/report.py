"""Results as tables, for the terminal and in Markdown, and as JSON. All three are made from the same plain dictionary."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.measuring.group import Record
from benchmarks.measuring.limits import Limits
from benchmarks.measuring.model import ModelRecord
from benchmarks.rows.shapes import Shape

SCHEMA = 3
COLUMNS = ("row", "ms (p20 .. p80)", "x frozen", "counted", "x PEFT", "roofline", "peak MiB", "saved B/token")
MODEL_COLUMNS = ("row", "tokens/s", "ms (p20 .. p80)", "x frozen", "peak MiB", "trained")

Results = dict[str, Any]

READING = """\
- **ms**: median over the rounds of all visits, with the 20th and 80th percentiles. All rows of a table are interleaved in
  one process; every table is visited several times in a run, on fresh inputs.
- **x frozen, x PEFT**: times the frozen linear's time, and that of PEFT's one LoRA, in the same round; median over rounds.
- **counted**: the same ratio, computed from the bytes and FLOPs of the row's operations at the limits above, each operation
  by itself, no cache between two of them; products of at most 16 rows, columns or summands at the rate of narrow ones.
- **roofline**: the least time for what the row computes (bytes at the copy's bandwidth, FLOPs at the GEMM's rate), as a
  share of the measured time. A copy reads and writes; an operation that mostly reads can exceed 100 %.
- **peak**: the most that one call allocates at one time, beyond the inputs. **saved**: kept for the backward, likewise.
- *forward* runs under no_grad. The backward computes the gradients of x, experts and gate; of x and the adapters for LoRA
  rows; of x and the gates for X-LoRA, whose adapters are frozen; of x for the frozen linear.
- Every row was compared with its own definition in float64, outputs and gradients, before it was timed."""


def make_results(
    environment: dict[str, object], limits: Limits, method: str, records: list[Record], models: list[ModelRecord], plan: str
) -> Results:
    """Everything of a run, as JSON can hold it."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "limits": asdict(limits),
        "method": method,
        "records": [asdict(record) for record in records],
        "model": plan,
        "models": [asdict(record) for record in models],
    }


def load(path: Path) -> Results:
    """Read a run's JSON.

    Raises:
        ValueError: the file does not hold a run of this schema.
    """
    try:
        results = json.loads(path.read_text())
        if results["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, got {results['schema']}")
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be the JSON of a run of `python -m benchmarks`, got {error!r}") from None
    return results


def shape_of(record: dict[str, Any]) -> Shape:
    """The shape of a record."""
    return Shape(**record["shape"])


def tables(results: Results) -> Iterator[tuple[str, list[list[str]]]]:
    """A title and the cells of each table, header first."""
    for key, group in groupby(results["records"], key=_title):
        yield key, [list(COLUMNS), *(_cells(record) for record in group)]
    for phase, group in groupby(results["models"], key=lambda record: record["phase"]):
        yield f"whole model, {phase}", [list(MODEL_COLUMNS), *(_model_cells(record) for record in group)]


def terminal(results: Results) -> str:
    """The tables with aligned columns."""
    return "\n".join([heading(results), *(f"\n{title}\n{_aligned(cells)}" for title, cells in tables(results))])


def markdown(results: Results) -> str:
    """The tables, and how to read them."""
    parts = [f"# Benchmarks: {results['environment']['device']}", "", heading(results), "", READING]
    if results["models"]:
        parts += ["", f"Whole model: {results['model']}. The frozen model's step is forward and backward to its embeddings."]
    for title, (header, *rows) in tables(results):
        rule = ["---"] + ["---:"] * (len(header) - 1)
        parts += ["", f"## {title}", "", *("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))]
    return "\n".join(parts) + "\n"


def heading(results: Results) -> str:
    """Machine, versions and limits, in three lines."""
    environment, limits = results["environment"], results["limits"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    rates = ", ".join(
        f"{name} GEMM {_rate(rate)} (16 columns: {_rate(limits['narrow_flops_per_s'][name])})"
        for name, rate in limits["gemm_flops_per_s"].items()
    )
    load = "" if environment["load"] is None else f", load {environment['load']} at the start"
    load += f", OpenMP threads wait {environment['waiting']}" if environment["waiting"] else ""
    read = limits.get("cache_bytes_per_s")
    cache = f", L2 read {read / 1e9:.3g} GB/s" if read else ""
    run = f"{environment['date']}, commit {environment['commit']}"
    run += f", stopped {environment['stopped']}" if "stopped" in environment else ""
    return (
        f"{environment['device']}, {environment['threads']} threads{load}; {run}\n"
        f"{environment['system']}, {packages}\n"
        f"measured limits: copy {limits['copy_bytes_per_s'] / 1e9:.3g} GB/s{cache}, {rates}; {results['method']}"
    )


def write(results: Results, folder: Path) -> list[Path]:
    """results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.json", folder / "results.md"]
    paths[0].write_text(json.dumps(_rounded(results), indent=1) + "\n")
    paths[1].write_text(markdown(results))
    return paths


def _title(record: dict[str, Any]) -> str:
    launch = ", CUDA graph" if record["launch"] == "graph" else ""
    return f"{shape_of(record)}: {record['scope']}, {record['phase']}{launch}"


def _cells(record: dict[str, Any]) -> list[str]:
    if record["seconds"] is None:
        return [record["label"], record["status"], *[""] * (len(COLUMNS) - 2)]
    tokens, saved = max(1, record["shape"]["tokens"]), record["saved_bytes"]
    counted = record["counted_over_frozen"]
    return [
        record["label"],
        _milliseconds(record["seconds"]),
        _ratio(record["over_frozen"]),
        "" if counted is None else f"{counted:.2f}",
        _ratio(record["over_peft"]),
        f"{100 * record['floor_seconds'] / record['seconds']['median']:.0f} %",
        f"{record['peak_bytes'] / 2**20:.1f}",
        "" if saved is None else f"{saved / tokens:.0f}",
    ]


def _model_cells(record: dict[str, Any]) -> list[str]:
    if record["seconds"] is None:
        return [record["label"], record["status"], *[""] * (len(MODEL_COLUMNS) - 2)]
    return [
        record["label"],
        f"{record['tokens_per_second']:.0f}",
        _milliseconds(record["seconds"]),
        _ratio(record["over_frozen"]),
        f"{record['peak_bytes'] / 2**20:.1f}",
        f"{record['trained_parameters']:,}",
    ]


def _milliseconds(spread: dict[str, float]) -> str:
    median, low, high = (1e3 * spread[key] for key in ("median", "low", "high"))
    return f"{median:.3g} ({low:.3g} .. {high:.3g})"


def _ratio(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2f}"


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def _aligned(rows: Iterable[list[str]]) -> str:
    """Columns padded to their widest cell; a reason continues over the empty cells after it."""
    rows = list(rows)
    plain = [row for row in rows if any(row[2:])]
    widths = [max(len(row[i]) for row in plain) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        first = f"  {row[0]:<{widths[0]}}  "
        rest = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(first + ("  ".join(rest) if row in plain else row[1]))
    return "\n".join(line.rstrip() for line in lines)


def _rounded(value: Any) -> Any:
    """Floats with six digits: the measurements are not more precise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
