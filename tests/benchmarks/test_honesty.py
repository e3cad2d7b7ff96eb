"""What published figures rest on: the error rule, the clocks, the copies of the inputs, the ratios, and the phases."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks.measuring import group as group_module
from benchmarks.measuring import timing
from benchmarks.measuring.group import MOST_COPIES, Group, call_of, ratio
from benchmarks.measuring.timing import Call, interleave
from benchmarks.rows import checks
from benchmarks.rows.shapes import DTYPES, Shape, make_inputs
from benchmarks.rows.steps import GradInput, Step
from benchmarks.rows.table import rows
from tests.benchmarks.small import BRIEF, CPU, LIMITS, SMALL
from tools.error_rule import ORDERS, Errors, complaint, errors, worst

HALF_AND_FULL = pytest.mark.parametrize("dtype", DTYPES)


@HALF_AND_FULL
@pytest.mark.parametrize("error_of_plain", [0.0, 2.0], ids=lambda epsilons: f"plain is {epsilons} epsilons off")
def test_an_error_may_exceed_that_of_plain_pytorch_by_a_few_epsilons(dtype: str, error_of_plain: float) -> None:
    """One epsilon on average and two in one element, four times that in fp32, each to within a twentieth."""
    eps = torch.finfo(DTYPES[dtype]).eps
    true = torch.ones(50, dtype=torch.float64)
    small = eps * (4 if dtype == "float32" else 1)
    rms, largest = error_of_plain * eps + small, error_of_plain * eps + 2 * small
    one = torch.eye(1, 50, dtype=torch.float64)[0]
    of_plain = errors(true + error_of_plain * eps, true)

    def found(ours: torch.Tensor) -> str | None:
        return complaint(ours, of_plain, true, DTYPES[dtype])

    assert found(true + 0.95 * rms) is None
    assert found(true - 0.95 * largest * one) is None
    assert str(found(true - 1.05 * rms)).startswith("rms error")
    assert str(found(true + 1.05 * largest * one)).startswith("largest error")


@HALF_AND_FULL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("whose", ["ours", "plain", "true"])
def test_what_is_not_finite_is_not_right(whose: str, bad: float, dtype: str) -> None:
    results = {name: torch.ones(50, dtype=torch.float64) for name in ("ours", "plain", "true")}

    def found() -> str | None:
        true = results["true"]
        return complaint(results["ours"], errors(results["plain"], torch.ones_like(true)), true, DTYPES[dtype])

    assert found() is None
    results[whose][torch.randint(50, ())] = bad
    expected = {"ours": "not finite", "plain": "plain PyTorch is not finite", "true": "the truth is not finite"}
    assert found() == expected[whose]


def test_of_several_orders_the_worst_counts() -> None:
    assert worst([Errors(1.0, 2.0), Errors(0.5, 3.0)]) == (1.0, 3.0)
    not_finite = [Errors(0.5, 3.0), Errors(float("nan"), 2.0)]
    for found in (not_finite, not_finite[::-1]):
        assert math.isnan(worst(found).rms)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_judged_by_a_truth_in_float64(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """y and all gradients; the truth is computed from the numbers that the row gets."""
    judged = []

    def recording(ours, of_plain, true, of):
        judged.append((ours.dtype, true.dtype, of, min(of_plain) > 0))
        return complaint(ours, of_plain, true, of)

    monkeypatch.setattr(checks, "complaint", recording)
    inputs = make_inputs(replace(SMALL, dtype=dtype), CPU)
    checker = checks.Checker(inputs, BRIEF.cpu_products)
    assert checker.complaint(rows()["torch"], "layer") is None
    own = DTYPES[dtype]
    assert judged == [(own, torch.float64, own, True)] * 5, "plain PyTorch without an error is not plain"
    wide = inputs.double()
    gates = (wide.x @ wide.gate_weight.t()).softmax(dim=1)
    mixed_a, mixed_b = (torch.einsum("te,erf->trf", gates, factor) for factor in (wide.lora_a, wide.lora_b))
    delta = torch.einsum("tro,tri,ti->to", mixed_b, mixed_a, wide.x)
    torch.testing.assert_close(checker.truths["factors", "layer"]["y"], wide.x @ wide.weight.t() + 2 * delta)


@pytest.mark.parametrize("definition, scope", checks.DEFINITIONS)
def test_plain_pytorch_computes_the_definition_in_every_order(definition: str, scope: str) -> None:
    """The results are put back into the order of the inputs: in float64 they are all the truth."""
    inputs = make_inputs(SMALL, CPU).double()
    exact, in_plain = checks.DEFINITIONS[definition, scope]
    true = checks.evaluate(exact, inputs, 3)
    found = list(checks.in_orders(in_plain, inputs))
    assert len(found) == ORDERS
    for results in found:
        assert results.keys() == true.keys()
        for name, result in results.items():
            torch.testing.assert_close(result, true[name])
    assert len({results["x"].sum().item() for results in found}) > 1, "all orders are the same"


class _Time:
    """A clock that advances by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("count", [1, 4])
def test_the_hosts_clock_gives_seconds_of_one_call(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = _Time(), []

    def call() -> None:
        called.append(1)
        clock.now += 3.0

    monkeypatch.setattr(timing, "time", clock)
    assert timing.HostClock().sample([call], 0, count) == (3.0 * count + 1.0) / count
    assert len(called) == count


@pytest.mark.parametrize("count", [1, 4])
def test_the_devices_clock_gives_seconds_of_one_call(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events give milliseconds; the work between the two is timed, and nothing else."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: "Event") -> float:
            log.append("read")
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing.DeviceClock().sample([lambda: log.append("call")], 0, count) == 2.5 / count
    assert log == ["record", *["call"] * count, "record", "synchronize", "read"]


def test_samples_take_all_copies_of_the_inputs_in_turn() -> None:
    """A sample begins with the copy after the last one used, so that no copy is still in the cache."""
    used: list[int] = []

    class Clock:
        def sample(self, calls: Sequence[Call], first: int, count: int) -> float:
            for i in range(first, first + count):
                calls[i % len(calls)]()
            return 1.0

    calls = [lambda copy=copy: used.append(copy) for copy in range(5)]
    interleave({"row": calls}, Clock(), replace(BRIEF, sample_seconds=3.0, min_rounds=4, max_rounds=4))
    rounds = used[-4 * 3 :]
    assert rounds == [i % 5 for i in range(12)]


@pytest.mark.parametrize(("cache", "copies"), [(1, 1), (2, 4), (3, 6), (100, MOST_COPIES)])
def test_there_are_more_copies_than_the_cache_holds(cache: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many, or the most that are allowed; `cache` is the cache's size in inputs, but 1 byte in the first case."""
    made: list[int] = []

    def counting(shape: Shape, device: torch.device, seed: int):
        made.append(seed)
        return make_inputs(shape, device, seed)

    monkeypatch.setattr(group_module, "make_inputs", counting)
    limits = replace(LIMITS, cache_bytes=1 if cache == 1 else cache * SMALL.bytes)
    Group(SMALL, "layer", ["forward"], [rows()["frozen"]], CPU, limits, BRIEF).visit()
    assert made == list(range(copies))


def test_a_ratio_is_a_rows_time_over_the_others_round_by_round() -> None:
    """The median of ratios, not the ratio of medians: a slow round slows both rows."""
    visits = [{"row": [2.0, 40.0], "frozen": [1.0, 10.0]}, {"row": [9.0], "frozen": [3.0]}]
    found = ratio(visits, "row", "frozen")
    assert found is not None
    assert (found.median, found.visits) == (3.0, (3.0, 3.0))
    assert ratio(visits, "row", "peft") is None


def test_a_row_that_takes_longer_than_the_frozen_linear_has_a_ratio_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(calls: dict[str, list[Callable]], *_, **__) -> dict[str, list[float]]:
        return {name: [{"frozen": 1.0, "torch": 1.5}[name]] * 2 for name in calls}

    monkeypatch.setattr(group_module, "interleave", interleaved)
    group = Group(SMALL, "layer", ["forward"], [rows()[name] for name in ("frozen", "torch")], CPU, LIMITS, BRIEF)
    group.visit()
    ratios = {record.row: record.over_frozen.median for record in group.records() if record.over_frozen}
    assert ratios == {"frozen": 1.0, "torch": 1.5}


def test_each_phase_runs_the_directions_in_its_name() -> None:
    """The forward builds no graph, the backward runs no forward, and "forward+backward" runs both."""
    x, log = torch.ones(3, requires_grad=True), []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            log.append("forward")
            return 2 * t

        @staticmethod
        def backward(ctx, grad):
            log.append("backward")
            return 2 * grad

    step, dy = Step(lambda: Product.apply(x), (GradInput(x, "x"),)), torch.ones(3)
    for phase, expected in {
        "forward": ["forward"], "backward": ["backward"], "forward+backward": ["forward", "backward"],
    }.items():  # fmt: skip
        call = call_of(step, dy, phase)
        log.clear()
        result = call()
        assert log == expected
        assert not getattr(result, "requires_grad", False)
