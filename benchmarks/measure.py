"""Measure the rows of a group side by side: check each, then time them interleaved, then weigh their memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
    counted_over_frozen: float | None = None  # what these bytes and FLOPs let expect
    peak_bytes: int | None = None
    saved_bytes: int | None = None


class Group:
    """The rows of one shape and scope, built on the same inputs."""

    def __init__(
        self, shape: Shape, scope: str, rows: Iterable[Row], device: torch.device, limits: Limits, effort: Effort
    ) -> None:
        self.shape, self.scope, self.device, self.limits, self.effort = shape, scope, device, limits, effort
        self.rows = [row for row in rows if scope in row.scopes]
        self.reasons: dict[str, str] = {}  # of the rows that are not timed
        self.steps: dict[str, list[Step]] = {}  # of the others: one for each copy of the inputs
        self.inputs: list[Inputs] = []
        if any(row.compiled for row in self.rows):
            torch._dynamo.reset()  # its limit of recompilations would count the shapes of earlier groups

        copies = max(1, min(MOST_COPIES, -(-2 * limits.cache_bytes // shape.bytes)))
        free, needed = available_bytes(device), (copies + CHECKED) * shape.bytes
        todo = []
        for row in self.rows:
            reason, more = row.why_not(shape, device), bytes_needed(row, shape)
            if reason is None and needed + more > free:
                reason = f"needs about {(needed + more) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            if reason is not None:
                self.reasons[row.name] = f"not run: {reason}"
            else:
                needed += more  # rows are held side by side
                todo.append(row)
        if todo:
            self.inputs = [make_inputs(shape, device, seed) for seed in range(copies)]
            checker = Checker(self.inputs[0], effort.cpu_products)
            for row in todo:
                self._build(row, checker)

    def _build(self, row: Row, checker: Checker) -> None:
        """Check a row, and build it on every copy of the inputs; else keep the reason why not."""
        try:
            complaint = checker.complaint(row, self.scope)
            if complaint is None:
                self.steps[row.name] = [row.build(inputs, self.scope) for inputs in self.inputs]
            else:
                self.reasons[row.name] = f"wrong result: {complaint}"
        except NotRun as reason:
            self.reasons[row.name] = f"not run: {reason}"
        except torch.OutOfMemoryError:
            self.reasons[row.name] = "not run: out of memory"
        except Exception as error:  # a row that breaks must not take the others' results along
            what = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            self.reasons[row.name] = f"not run: torch.compile: {what}" if row.compiled else f"failed: {what}"

    def records(self, phase: str, launch: str = "eager") -> Iterator[Record]:
        """Time all rows in one phase."""
        gradients = [inputs.dy for inputs in self.inputs]
        calls = {
            name: [call_of(*pair, phase) for pair in zip(steps, gradients, strict=True)]
            for name, steps in self.steps.items()
        }
        timed = calls
        if launch == "graph":
            timed = {name: [capture(call) for call in copies] for name, copies in calls.items()}
        samples = interleave(timed, clock_for(self.device), self.effort)
        weights: dict[str, dict[str, Any]] = {name: self._weigh(name, copies[0], phase) for name, copies in calls.items()}
        for row in self.rows:
            common = row.name, row.says, self.scope, phase, launch, self.shape
            if row.name in self.reasons:
                yield Record(*common, status=self.reasons[row.name])
                continue
            seconds = Spread.of(samples[row.name])
            if launch == "eager" and self.device.type == "cuda" and seconds.median < REPLAY_ONLY:
                yield Record(*common, status="not timed: below 100 us the host is measured, see the graph's row")
                continue
            yield Record(
                *common,
                seconds=seconds,
                over_frozen=_ratio(samples, row.name, "frozen"),
                over_peft=_ratio(samples, row.name, "peft"),
                floor_seconds=floor_seconds(row.definition, self.shape, self.scope, phase, self.limits),
                **weights[row.name],
                counted_over_frozen=self._expected(weights, row.name, phase),
            )

    def _weigh(self, name: str, call: Call, phase: str) -> dict[str, int]:
        """The bytes of one call, and what its operations move; the latter is not to be seen in compiled code."""
        weights = {"peak_bytes": peak_bytes(call, self.device)}
        if phase == "forward+backward":
            inputs = {key: t for key, t in vars(self.inputs[0]).items() if isinstance(t, torch.Tensor)}
            weights["saved_bytes"] = saved_bytes(self.steps[name][0], inputs)
        if not next(row for row in self.rows if row.name == name).compiled:
            with OpCounter() as counter:
                call()
            weights |= {"counted_bytes": counter.bytes, "counted_flops": counter.flops}
        return weights

    def _expected(self, weights: dict[str, dict[str, Any]], name: str, phase: str) -> float | None:
        """The frozen roofline and the extra bytes and FLOPs of the row's operations, over the frozen roofline."""
        if "frozen" not in weights or "counted_bytes" not in weights[name] or self.scope != "layer":
            return None
        extra_bytes = weights[name]["counted_bytes"] - weights["frozen"]["counted_bytes"]
        extra_flops = weights[name]["counted_flops"] - weights["frozen"]["counted_flops"]
        extra = max(extra_bytes / self.limits.copy_bytes_per_s, extra_flops / self.limits.gemm_flops_per_s[self.shape.dtype])
        return 1 + extra / floor_seconds("frozen", self.shape, self.scope, phase, self.limits)


def call_of(step: Step, dy: Tensor, phase: str) -> Call:
    """What is timed of a row: the forward alone under no_grad, as inference runs it."""
    tensors = [leaf.tensor for leaf in step.leaves]
    if phase == "forward":
        return torch.no_grad()(step.forward)
    if phase == "backward":
        y = step.forward()
        return lambda: torch.autograd.grad(y, tensors, dy, retain_graph=True)
    return lambda: torch.autograd.grad(step.forward(), tensors, dy)


def _ratio(samples: dict[str, list[float]], name: str, other: str) -> Spread | None:
    """A row's time over another's, round by round."""
    if other not in samples:
        return None
    return Spread.of([ours / theirs for ours, theirs in zip(samples[name], samples[other], strict=True)])
