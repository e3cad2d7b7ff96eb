"""Measure the rows of a group side by side: check each, then time them interleaved, then weigh their memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import NotRun, Row, Step, bytes_needed
from benchmarks.checks import Checker
from benchmarks.limits import Limits, floor_seconds
from benchmarks.memory import OpCounter, available_bytes, peak_bytes, saved_bytes
from benchmarks.shapes import Inputs, Shape, make_inputs
from benchmarks.timing import REPLAY_ONLY, Call, Effort, Spread, capture, clock_for, interleave

MOST_COPIES = 16  # of the inputs, to rotate past the cache
LAUNCHES = {"cpu": ("eager",), "cuda": ("eager", "graph")}
COUNTED = ("counted_bytes", "counted_flops", "counted_seconds")
CHECKED = 12  # further copies, in bytes, that the check in float64 takes with its gradients


@dataclass(frozen=True)
class Record:
    """One row of the results. Where `status` is not "ok" it says why, and no speed is given."""

    row: str
    says: str
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
    counted_seconds: float | None = None  # what these bytes and FLOPs let expect
    counted_over_frozen: float | None = None  # likewise
    peak_bytes: int | None = None
    saved_bytes: int | None = None


class Group:
    """The rows of one shape and scope: `visit` times them side by side, `records` sums up all visits."""

    def __init__(
        self, shape: Shape, scope: str, phases: Iterable[str], rows: Iterable[Row], device: torch.device, limits: Limits,
        effort: Effort,
    ) -> None:  # fmt: skip
        self.shape, self.scope, self.phases, self.device = shape, scope, tuple(phases), device
        self.limits, self.effort = limits, effort
        self.rows = [row for row in rows if scope in row.scopes]
        self.reasons: dict[str, str] = {}  # of the rows that are not timed
        self.not_captured: dict[tuple[str, str], str] = {}  # why no CUDA graph holds a phase of a row
        self.right: set[str] = set()  # the rows whose results were checked
        self.samples: dict[tuple[str, str], list[dict[str, list[float]]]] = {}  # of phase and launch: for each visit
        self.weights: dict[str, dict[str, dict[str, Any]]] = {}  # of a phase: what its rows weigh

    def __str__(self) -> str:
        return f"{self.shape}: {self.scope}"

    def visit(self) -> None:
        """Build every row on fresh inputs, check it the first time, and time all phases."""
        inputs, steps = self._build()
        for phase, launch in product(self.phases, LAUNCHES[self.device.type]):
            calls = self._calls(steps, inputs, phase, launch)
            if phase not in self.weights:
                self.weights[phase] = {
                    name: self._weigh(name, copies[0], steps[name][0], inputs[0], phase) for name, copies in calls.items()
                }
            before = self.samples.get((phase, launch), [])
            taken = interleave(calls, clock_for(self.device), self.effort, seed=len(before))
            self.samples[phase, launch] = [*before, taken]  # only now: an interrupted visit leaves no trace
            calls.clear()  # a backward's graph that lives on would tie its leaves to this launch's stream

    def _calls(self, steps: dict[str, list[Step]], inputs: list[Inputs], phase: str, launch: str) -> dict[str, list[Call]]:
        """What is timed of each row, on every copy of the inputs; of a row that no CUDA graph can hold nothing."""
        calls = {}
        for name, copies in steps.items():
            makes = [partial(call_of, step, inputs[i].dy, phase) for i, step in enumerate(copies)]
            if launch == "eager":
                calls[name] = [make() for make in makes]
            elif (phase, name) not in self.not_captured:
                try:
                    calls[name] = [capture(make) for make in makes]
                except Exception as error:  # it must not take the others' results along
                    self.not_captured[phase, name] = _told(error)
        return calls

    def records(self) -> Iterator[Record]:
        """Every row in every phase that was visited."""
        for (phase, launch), visits in self.samples.items():
            for row in self.rows:
                common = row.name, row.says, self.scope, phase, launch, self.shape
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
                    **self.weights[phase][row.name],
                    counted_over_frozen=self._counted_over_frozen(row.name, phase),
                )

    def _build(self) -> tuple[list[Inputs], dict[str, list[Step]]]:
        """Copies of the inputs, and of each row that can be timed a step on each of them."""
        if any(row.compiled for row in self.rows):
            torch._dynamo.reset()  # its limit of recompilations would count the shapes of earlier groups
        copies = max(1, min(MOST_COPIES, -(-2 * self.limits.cache_bytes // self.shape.bytes)))
        free, needed = available_bytes(self.device), (copies + CHECKED) * self.shape.bytes
        for row in self.rows:
            reason, more = row.why_not(self.shape, self.device), bytes_needed(row, self.shape)
            if reason is None and needed + more > free:
                reason = f"needs about {(needed + more) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            if reason is not None:
                self.reasons[row.name] = f"not run: {reason}"
            else:
                needed += more  # rows are held side by side
        todo = [row for row in self.rows if row.name not in self.reasons]
        if not todo:
            return [], {}
        inputs = [make_inputs(self.shape, self.device, seed) for seed in range(copies)]
        checker = Checker(inputs[0], self.effort.cpu_products)
        steps = {row.name: self._steps(row, inputs, checker) for row in todo}
        return inputs, {name: built for name, built in steps.items() if built}

    def _steps(self, row: Row, inputs: list[Inputs], checker: Checker) -> list[Step]:
        """A checked row on every copy of the inputs; nothing where there is a reason why not, which is kept."""
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
        except Exception as error:  # a row that breaks must not take the others' results along
            what = "not run: torch.compile" if row.compiled else "failed"
            self.reasons[row.name] = f"{what}: {_told(error)}"
        return []

    def _weigh(self, name: str, call: Call, step: Step, inputs: Inputs, phase: str) -> dict[str, Any]:
        """The bytes of one call, and what its operations move; the latter is not to be seen in compiled code."""
        weights: dict[str, Any] = {"peak_bytes": peak_bytes(call, self.device)}
        if phase == "forward+backward":
            given = {key: t for key, t in vars(inputs).items() if isinstance(t, torch.Tensor)}
            weights["saved_bytes"] = saved_bytes(step, given)
        if not next(row for row in self.rows if row.name == name).compiled:
            with OpCounter(self.limits, self.shape.dtype) as counter:
                call()
            weights |= {name: getattr(counter, name.removeprefix("counted_")) for name in COUNTED}
        return weights

    def _counted_over_frozen(self, name: str, phase: str) -> float | None:
        weights = self.weights[phase]
        if self.scope != "layer" or "frozen" not in weights or "counted_seconds" not in weights[name]:
            return None
        return weights[name]["counted_seconds"] / weights["frozen"]["counted_seconds"]


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def call_of(step: Step, dy: Tensor, phase: str) -> Call:
    """What is timed of a row: the forward alone under no_grad, as inference runs it."""
    tensors = [leaf.tensor for leaf in step.leaves]
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
