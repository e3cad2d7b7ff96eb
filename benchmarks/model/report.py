"""The tables of the model, as text and as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.model.chips import LAUNCH_EAGER, LAUNCH_GRAPH, LAUNCH_HIDDEN, Chip
from benchmarks.model.estimate import Estimate, floor_seconds
from benchmarks.model.torch_backend import operations
from benchmarks.rows.shapes import Shape

DIRECTIONS = ("forward", "backward")
MEASURED = "Measured on an H200 (2026-11-26), CUDA graphs of the engine take 1.2 to 1.6 times as long as this model says."
HIDES_THE_HOST = 4096  # tokens from which on the host runs ahead of the kernels


class Row(NamedTuple):
    """One direction of one shape on one chip."""

    chip: Chip
    shape: Shape
    direction: str
    path: str
    kernels: Sequence[Estimate]

    @property
    def floor(self) -> float:
        """Seconds of the delta alone."""
        return floor_seconds(self.chip, self.shape, self.direction)

    @property
    def seconds(self) -> float:
        """Of all kernels, without gaps between them."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def torch_launches(self) -> int:
        """The kernels of the `torch` backend."""
        return len(self._operations)

    @property
    def torch_seconds(self) -> float:
        """Of all of them, without gaps."""
        return sum(one.seconds(self.chip) for one in self._operations)

    @property
    def _operations(self) -> list[Any]:
        return operations(self.shape)[DIRECTIONS.index(self.direction)]

    def gap(self, graph: bool) -> float:
        """Seconds between two kernels."""
        return LAUNCH_GRAPH if graph else LAUNCH_HIDDEN if self.shape.tokens >= HIDES_THE_HOST else LAUNCH_EAGER

    def totals(self, graph: bool) -> tuple[float, float]:
        """Seconds of the `cuda` and the `torch` backend with a gap in front of each kernel."""
        gap = self.gap(graph)
        return self.seconds + gap * len(self.kernels), self.torch_seconds + gap * self.torch_launches

    def record(self) -> dict[str, Any]:
        """The row for the file of JSON."""
        of = {name: [1e6 * seconds for seconds in self.totals(graph)] for name, graph in (("eager", False), ("graph", True))}
        return {
            "chip": self.chip.name, "shape": asdict(self.shape),
            "direction": self.direction, "path": self.path, "floor_us": 1e6 * self.floor,
            "cuda_us": 1e6 * self.seconds, "cuda_launches": len(self.kernels),
            "torch_us": 1e6 * self.torch_seconds, "torch_launches": self.torch_launches,
            **{f"{backend}_{name}_us": of[name][i] for name in of for i, backend in enumerate(("cuda", "torch"))},
            "kernels": [_record(kernel) for kernel in self.kernels],
        }  # fmt: skip


def _record(kernel: Estimate) -> dict[str, Any]:
    found = kernel._asdict()
    step, seconds, floor = found.pop("step"), found.pop("seconds"), found.pop("floor")
    return found | {"step": step and step._asdict(), "us": 1e6 * seconds, "floor_us": 1e6 * floor}


def _of_step(cell: Callable[[Any], object]) -> Callable[[Estimate], object]:
    return lambda kernel: "" if kernel.step is None else cell(kernel.step)


COLUMNS: dict[str, tuple[int, Callable[[Estimate], object]]] = {  # the width and the cell, by the title
    "regs": (4, lambda kernel: kernel.registers or ""),
    "blocks": (6, lambda kernel: kernel.blocks),
    "at once": (7, lambda kernel: kernel.resident),
    "instr": (5, _of_step(lambda step: f"{step.instructions:.0f}")),
    "HMMA": (4, _of_step(lambda step: f"{step.products:.0f}")),
    "alone": (6, _of_step(lambda step: f"{step.alone:.0f}")),
    "us": (7, lambda kernel: f"{1e6 * kernel.seconds:.1f}"),
    "floor": (6, lambda kernel: f"{100 * kernel.floor / kernel.seconds:.0f} %"),
}
NAMES, WHOLE_NAMES = 34, 58  # widths of a kernel with its detail, and of a row
LEGEND = """\
regs      registers of a thread
at once   blocks that fit a processor at once
instr     instructions of a warp in one step of the main loop; HMMA: those for tensor cores among them
alone     cycles of a step for a warp that has the processor for itself
us        of the kernel; in a sum also with the gaps between kernels, one by one and in a graph
floor     the share of the time that a kernel's own bytes and FLOPs take; in a sum, that of x and y, or dy, x and dx, and of
          the factors and their gradients, once
bound     what takes the longest, in the phase that takes the longest"""


def table(row: Row) -> str:
    """The kernels of one row, their sum, and the `torch` backend."""
    titles = "".join(f" {title:>{width}}" for title, (width, _) in COLUMNS.items())
    lines = [f"{row.chip.name}, {row.shape}, {row.direction} ({row.path})", f"{'':<{NAMES}}{titles}  bound"]
    for kernel in row.kernels:
        cells = "".join(f" {cell(kernel):>{width}}" for width, cell in COLUMNS.values())
        lines.append(f"{f'{kernel.kernel} {kernel.detail}'.strip():<{NAMES}}{cells}  {kernel.bound}")
    (eager, torch_eager), (graph, torch_graph) = row.totals(False), row.totals(True)
    lines.append(
        f"cuda:  {1e6 * row.seconds:.1f} us of a floor of {1e6 * row.floor:.1f}, {100 * row.floor / row.seconds:.0f} %; "
        f"with {len(row.kernels)} gaps {1e6 * eager:.1f}, in a graph {1e6 * graph:.1f}"
    )
    lines.append(
        f"torch: {1e6 * row.torch_seconds:.1f} us; with {row.torch_launches} gaps {1e6 * torch_eager:.1f}, in a graph "
        f"{1e6 * torch_graph:.1f}; {_verdict(eager, torch_eager, graph, torch_graph)}"
    )
    return "\n".join(lines)


def _verdict(eager: float, torch_eager: float, graph: float, torch_graph: float) -> str:
    faster = [eager <= torch_eager, graph <= torch_graph]
    if faster[0] == faster[1]:
        return f"{'cuda' if faster[0] else 'TORCH'} is faster"
    return f"{'cuda' if faster[0] else 'TORCH'} is faster, in a graph {'cuda' if faster[1] else 'TORCH'}"


def summary(rows: Sequence[Row]) -> str:
    """A line for each row."""
    titles = f"{'floor':>7} {'cuda':>7} {'share':>5} {'eager: cuda':>12} {'torch':>7} {'graph: cuda':>12} {'torch':>7}"
    lines = [f"{'us':<{WHOLE_NAMES}} {titles}"]
    for row in rows:
        (eager, torch_eager), (graph, torch_graph) = row.totals(False), row.totals(True)
        name = f"{row.chip.name} {row.direction:<8} {row.shape}"
        lines.append(
            f"{name:<{WHOLE_NAMES}} {1e6 * row.floor:7.1f} {1e6 * row.seconds:7.1f} {100 * row.floor / row.seconds:3.0f} % "
            f"{1e6 * eager:12.1f} {1e6 * torch_eager:7.1f} {1e6 * graph:12.1f} {1e6 * torch_graph:7.1f}  "
            f"{_verdict(eager, torch_eager, graph, torch_graph)}"
        )
    return "\n".join(lines)


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The rows of two files of JSON next to one another."""
    columns = ("floor", "before", "share", "after", "share", "torch", "launches", "of torch")
    old_run, new_run = (f"commit {run['commit']} of {run['date']}" for run in (before, after))
    lines = [
        f"A MODEL, nothing was measured: {old_run}, and {new_run}.",
        MEASURED,
        "us of the kernels, without the gaps between them; shares are of the floor.",
        "",
        f"{'':<{WHOLE_NAMES}}" + "".join(f"{title:>9}" for title in columns),
    ]
    earlier = {_key(row): row for row in before["rows"]}
    for row in after["rows"]:
        old, cells = earlier.get(_key(row)), [f"{row['floor_us']:.1f}"]
        for one in (old, row):
            cells += (
                ["-", "-"] if one is None else [f"{one['cuda_us']:.1f}", f"{100 * row['floor_us'] / one['cuda_us']:.0f} %"]
            )
        cells += [f"{row['torch_us']:.1f}", str(row["cuda_launches"]), str(row["torch_launches"])]
        name = f"{row['chip']} {row['direction']:<8} {Shape(**row['shape'])}"
        lines.append(f"{name:<{WHOLE_NAMES}}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[str, Shape, str]:
    return row["chip"], Shape(**row["shape"]), row["direction"]


def write(folder: Path, name: str, text: str, content: dict[str, Any]) -> None:
    """The text and the JSON under one name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
