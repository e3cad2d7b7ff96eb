"""Measure the rows of a group together: check each, time them interleaved, and count their bytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.counting import OpCounter
from benchmarks.measuring.limits import Limits, floor_seconds
from benchmarks.measuring.memory import available_bytes, peak_bytes, saved_bytes
from benchmarks.measuring.timing import REPLAY_ONLY, Call, Effort, Spread, capture, clock_for, interleave
from benchmarks.rows.checks import Checker, tensors_of
from benchmarks.rows.shapes import Inputs, Shape, make_inputs
from benchmarks.rows.steps import NotRun, Row, Step
from benchmarks.rows.table import bytes_needed

MOST_COPIES = 16  # of the inputs: more than the cache holds are taken in turn
LAUNCHES = {"cpu": ("eager",), "cuda": ("eager", "graph")}
COUNTED = ("counted_bytes", "counted_flops", "counted_seconds")
CHECKED = 12  # the check in float64 and its gradients take about the bytes of so many further copies


@dataclass(frozen=True)
class Record:
    """One row of the results. Where `status` is not "ok" it says why, and no speed is given."""

    row: str
    label: str
    scope: str
    phase: str
    launch: str  # "eager", or "graph": the replay of a CUDA graph
    shape: Shape
    status: str = "ok"
    seconds: Spread | None = None
    over_frozen: Spread | None = None  # times the frozen linear's time in the same round
    over_peft: Spread | None = None  # times that of PEFT's one LoRA
    floor_seconds: float | None = None  # the roofline of what the row computes
    counted_bytes: int | None = None  # what its operations read and write
    counted_flops: int | None = None
    counted_seconds: float | None = None  # the time that these bytes and FLOPs let expect
    counted_over_frozen: float | None = None  # likewise
    peak_bytes: int | None = None
    saved_bytes: int | None = None


class Group:
    """The rows of one shape and scope: `visit` times them interleaved, `records` sums up all visits."""

    def __init__(
        self, shape: Shape, scope: str, phases: Iterable[str], rows: Iterable[Row], device: torch.device, limits: Limits,
        effort: Effort,
    ) -> None:  # fmt: skip
        self.shape, self.scope, self.phases, self.device = shape, scope, tuple(phases), device
        self.limits, self.effort = limits, effort
        self.rows = [row for row in rows if scope in row.scopes]
        self.reasons: dict[str, str] = {}  # why a row is not timed
        self.not_captured: dict[tuple[str, str], str] = {}  # why a phase of a row is not in a CUDA graph
        self.right: set[str] = set()  # the rows whose results were found right
        self.samples: dict[tuple[str, str], list[dict[str, list[float]]]] = {}  # by phase and launch, one dict a visit
        self.counts: dict[str, dict[str, dict[str, Any]]] = {}  # by phase and row: bytes and FLOPs, fields of Record

    def __str__(self) -> str:
        return f"{self.shape}: {self.scope}"

    def visit(self) -> None:
        """Build every row on fresh inputs, check it the first time, and time all phases."""
        inputs, steps = self._build()
        for phase, launch in product(self.phases, LAUNCHES[self.device.type]):
            calls = self._calls(steps, inputs, phase, launch)
            if phase not in self.counts:
                self.counts[phase] = {
                    name: self._count(name, copies[0], steps[name][0], inputs[0], phase) for name, copies in calls.items()
                }
            before = self.samples.get((phase, launch), [])
            taken = interleave(calls, clock_for(self.device), self.effort, seed=len(before))
            self.samples[phase, launch] = [*before, taken]  # at the end, so that an interrupted visit leaves no trace
            calls.clear()  # the graph of a backward, kept alive, would tie its inputs to the stream of this launch

    def _calls(self, steps: dict[str, list[Step]], inputs: list[Inputs], phase: str, launch: str) -> dict[str, list[Call]]:
        """The calls of each row, on every copy of the inputs; no calls of a row that cannot be captured in a CUDA graph.

        A captured call has a step of its own: autograd ties a leaf to the stream of its first use, which for the given steps
        is the default stream, where they run eagerly.
        """
        calls = {}
        for row in self.rows:
            if row.name not in steps:
                continue
            if launch == "eager":
                calls[row.name] = [call_of(step, copy.dy, phase) for step, copy in zip(steps[row.name], inputs, strict=True)]
            elif (phase, row.name) not in self.not_captured:
                try:
                    calls[row.name] = [capture(partial(self._fresh_call, row, copy, phase)) for copy in inputs]
                except Exception as error:  # one row must not end the measurement of the others
                    self.not_captured[phase, row.name] = _one_line(error)
        return calls

    def _fresh_call(self, row: Row, inputs: Inputs, phase: str) -> Call:
        """The call of a step that nothing has run."""
        return call_of(row.build(inputs, self.scope), inputs.dy, phase)

    def records(self) -> Iterator[Record]:
        """Every row in every phase that was visited."""
        for (phase, launch), visits in self.samples.items():
            for row in self.rows:
                common = row.name, row.label, self.scope, phase, launch, self.shape
                if row.name in self.reasons:
                    yield Record(*common, status=self.reasons[row.name])
                    continue
                if launch == "graph" and (phase, row.name) in self.not_captured:
                    yield Record(*common, status=f"not captured: {self.not_captured[phase, row.name]}")
                    continue
                seconds = Spread.of([visit[row.name] for visit in visits])
                if launch == "eager" and self.device.type == "cuda" and seconds.median < REPLAY_ONLY:
                    yield Record(*common, status="not timed: below 100 us the host is measured, see the graph's row")
                    continue
                yield Record(
                    *common,
                    seconds=seconds,
                    over_frozen=ratio(visits, row.name, "frozen"),
                    over_peft=ratio(visits, row.name, "peft"),
                    floor_seconds=floor_seconds(row.definition, self.shape, self.scope, phase, self.limits),
                    **self.counts[phase][row.name],
                    counted_over_frozen=self._counted_over_frozen(row.name, phase),
                )

    def _build(self) -> tuple[list[Inputs], dict[str, list[Step]]]:
        """Copies of the inputs, and for each row that can be timed a step on each of them."""
        if any(row.compiled for row in self.rows):
            torch._dynamo.reset()  # otherwise the shapes of earlier groups count towards its limit of recompilations
        copies = max(1, min(MOST_COPIES, -(-2 * self.limits.cache_bytes // self.shape.bytes)))
        free, needed = available_bytes(self.device), (copies + CHECKED) * self.shape.bytes
        for row in self.rows:
            reason, more = row.why_not(self.shape, self.device), bytes_needed(row, self.shape)
            if reason is None and needed + more > free:
                reason = f"needs about {(needed + more) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            if reason is not None:
                self.reasons[row.name] = f"not run: {reason}"
            else:
                needed += more  # all rows are in memory at the same time
        timed = [row for row in self.rows if row.name not in self.reasons]
        if not timed:
            return [], {}
        inputs = [make_inputs(self.shape, self.device, seed) for seed in range(copies)]
        checker = Checker(inputs[0], self.effort.cpu_products)
        steps = {row.name: self._steps(row, inputs, checker) for row in timed}
        return inputs, {name: built for name, built in steps.items() if built}

    def _steps(self, row: Row, inputs: list[Inputs], checker: Checker) -> list[Step]:
        """A checked row on every copy of the inputs; nothing where it cannot be timed, and the reason is kept."""
        try:
            complaint = None if row.name in self.right else checker.complaint(row, self.scope)
            if complaint is None:
                self.right.add(row.name)
                return [row.build(copy, self.scope) for copy in inputs]
            self.reasons[row.name] = f"wrong result: {complaint}"
        except NotRun as reason:
            self.reasons[row.name] = f"not run: {reason}"
        except torch.OutOfMemoryError:
            self.reasons[row.name] = "not run: out of memory"
        except Exception as error:  # a row that breaks must not end the measurement of the others
            what = "not run: torch.compile" if row.compiled else "failed"
            self.reasons[row.name] = f"{what}: {_one_line(error)}"
        return []

    def _count(self, name: str, call: Call, step: Step, inputs: Inputs, phase: str) -> dict[str, Any]:
        """The bytes of one call, and what its operations move, which cannot be counted in compiled code."""
        counts: dict[str, Any] = {"peak_bytes": peak_bytes(call, self.device)}
        if phase == "forward+backward":
            counts["saved_bytes"] = saved_bytes(step, tensors_of(inputs))
        if not next(row for row in self.rows if row.name == name).compiled:
            with OpCounter(self.limits, self.shape.dtype) as counter:
                call()
            counts |= {name: getattr(counter, name.removeprefix("counted_")) for name in COUNTED}
        return counts

    def _counted_over_frozen(self, name: str, phase: str) -> float | None:
        counts = self.counts[phase]
        if self.scope != "layer" or "frozen" not in counts or "counted_seconds" not in counts[name]:
            return None
        return counts[name]["counted_seconds"] / counts["frozen"]["counted_seconds"]


def _one_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def call_of(step: Step, dy: Tensor, phase: str) -> Call:
    """The call that is timed for a phase; the forward alone runs under no_grad, as in inference."""
    tensors = [grad_input.tensor for grad_input in step.grad_inputs]
    if phase == "forward":
        return torch.no_grad()(step.forward)
    if phase == "backward":
        y = step.forward()
        return lambda: torch.autograd.grad(y, tensors, dy, retain_graph=True)
    return lambda: torch.autograd.grad(step.forward(), tensors, dy)


def ratio(visits: list[dict[str, list[float]]], name: str, other: str) -> Spread | None:
    """A row's time over another's, round by round."""
    if not all(other in visit for visit in visits):
        return None
    return Spread.of([[a / b for a, b in zip(visit[name], visit[other], strict=True)] for visit in visits])
