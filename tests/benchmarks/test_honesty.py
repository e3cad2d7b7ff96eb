"""What keeps published figures honest: checks that see what is wrong, clocks that tell seconds, ratios the right way up."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks import checks, measure, timing
from benchmarks.baselines import Leaf, Step, rows
from benchmarks.limits import Limits
from benchmarks.measure import MOST_COPIES, Group
from benchmarks.shapes import DTYPES, Shape, make_inputs
from benchmarks.timing import Call, Effort, interleave

CPU = torch.device("cpu")
SMALL = Shape(tokens=7, in_features=24, out_features=40, num_experts=3, rank=4)
BRIEF = Effort(visits=1, seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=0.0, cpu_products=2**33)
LIMITS = Limits(1e9, dict.fromkeys(DTYPES, 1e12), dict.fromkeys(DTYPES, 1e11), cache_bytes=1)
HALF_AND_FULL = pytest.mark.parametrize("dtype", DTYPES)


@HALF_AND_FULL
@pytest.mark.parametrize("error_of_plain", [0.0, 2.0], ids=lambda epsilons: f"plain is {epsilons} epsilons off")
def test_the_tolerance_is_eight_epsilons_and_four_times_plain_pytorchs_error(dtype: str, error_of_plain: float) -> None:
    """To within a twentieth, for an error of every element and for that of one alone."""
    eps = torch.finfo(DTYPES[dtype]).eps
    true = torch.ones(50, dtype=torch.float64)
    plain, allowed = true + error_of_plain * eps, (8 + 4 * error_of_plain) * eps
    one = torch.eye(1, 50, dtype=torch.float64)[0]

    def complaint(ours: torch.Tensor) -> str | None:
        return checks.compare(ours, plain, true, DTYPES[dtype])

    assert complaint(true + 0.95 * allowed) is None
    assert complaint(true - 0.95 * allowed * one) is None
    assert str(complaint(true - 1.05 * allowed)).startswith("rms error")
    assert str(complaint(true + 1.05 * allowed * one)).startswith("largest error")


@HALF_AND_FULL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("whose", ["ours", "plain", "true"])
def test_what_is_not_finite_is_no_right_result(whose: str, bad: float, dtype: str) -> None:
    results = {name: torch.ones(50, dtype=torch.float64) for name in ("ours", "plain", "true")}
    assert checks.compare(**results, dtype=DTYPES[dtype]) is None
    results[whose][torch.randint(50, ())] = bad
    told = {"ours": "not finite", "plain": "plain PyTorch is not finite", "true": "the truth is not finite"}
    assert checks.compare(**results, dtype=DTYPES[dtype]) == told[whose]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_judged_by_a_truth_in_float64(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """y and all gradients; the truth is that of the very numbers that the row gets."""
    judged, compare = [], checks.compare

    def recording(ours, plain, true, of):
        judged.append((ours.dtype, plain.dtype, true.dtype, of))
        return compare(ours, plain, true, of)

    monkeypatch.setattr(checks, "compare", recording)
    inputs = make_inputs(replace(SMALL, dtype=dtype), CPU)
    checker = checks.Checker(inputs, BRIEF.cpu_products)
    assert checker.complaint(rows()["torch"], "layer") is None
    own = DTYPES[dtype]
    assert judged == [(own, own, torch.float64, own)] * 5
    true, plain = (checker._results("factors", "layer", exact)["y"] for exact in (True, False))
    wide = inputs.double()
    gates = (wide.x @ wide.gate_weight.t()).softmax(dim=1)
    mixed_a, mixed_b = (torch.einsum("te,erf->trf", gates, factor) for factor in (wide.lora_a, wide.lora_b))
    delta = torch.einsum("tro,tri,ti->to", mixed_b, mixed_a, wide.x)
    torch.testing.assert_close(true, wide.x @ wide.weight.t() + 2 * delta)
    assert (plain - true).abs().max() > torch.finfo(own).eps / 100, "plain PyTorch has no error: it is not plain"


class _Time:
    """A clock that goes on by a second each time it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("count", [1, 4])
def test_the_hosts_clock_tells_seconds_of_one_call(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = _Time(), []

    def call() -> None:
        called.append(1)
        clock.now += 3.0

    monkeypatch.setattr(timing, "time", clock)
    assert timing.HostClock().sample([call], 0, count) == (3.0 * count + 1.0) / count
    assert len(called) == count


@pytest.mark.parametrize("count", [1, 4])
def test_the_devices_clock_tells_seconds_of_one_call(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events tell milliseconds, and no more than what lies between them."""
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


def test_samples_walk_round_all_copies_of_the_inputs() -> None:
    """A sample begins where the last one ended: no copy is in the cache when its turn comes."""
    walked: list[int] = []

    class Clock:
        def sample(self, calls: Sequence[Call], first: int, count: int) -> float:
            for i in range(first, first + count):
                calls[i % len(calls)]()
            return 1.0

    calls = [lambda copy=copy: walked.append(copy) for copy in range(5)]
    interleave({"row": calls}, Clock(), replace(BRIEF, sample_seconds=3.0, min_rounds=4, max_rounds=4))
    rounds = walked[-4 * 3 :]
    assert rounds == [i % 5 for i in range(12)]


@pytest.mark.parametrize(("cache", "copies"), [(1, 1), (2, 4), (3, 6), (100, MOST_COPIES)])
def test_there_are_more_copies_than_the_cache_holds(cache: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many, or as many as are allowed; `cache` counts inputs, the first of them less a byte."""
    made: list[int] = []

    def counting(shape: Shape, device: torch.device, seed: int):
        made.append(seed)
        return make_inputs(shape, device, seed)

    monkeypatch.setattr(measure, "make_inputs", counting)
    limits = replace(LIMITS, cache_bytes=1 if cache == 1 else cache * SMALL.bytes)
    Group(SMALL, "layer", ["forward"], [rows()["frozen"]], CPU, limits, BRIEF).visit()
    assert made == list(range(copies))


def test_a_ratio_is_a_rows_time_over_the_others_round_by_round() -> None:
    """The median of ratios, not the ratio of medians: a slow round is slow for both."""
    visits = [{"row": [2.0, 40.0], "frozen": [1.0, 10.0]}, {"row": [9.0], "frozen": [3.0]}]
    found = measure.ratio(visits, "row", "frozen")
    assert found is not None
    assert (found.median, found.visits) == (3.0, (3.0, 3.0))
    assert measure.ratio(visits, "row", "peft") is None


def test_a_row_that_takes_longer_than_the_frozen_linear_has_a_ratio_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(calls: dict[str, list[Callable]], *_, **__) -> dict[str, list[float]]:
        return {name: [{"frozen": 1.0, "torch": 1.5}[name]] * 2 for name in calls}

    monkeypatch.setattr(measure, "interleave", interleaved)
    group = Group(SMALL, "layer", ["forward"], [rows()[name] for name in ("frozen", "torch")], CPU, LIMITS, BRIEF)
    group.visit()
    ratios = {record.row: record.over_frozen.median for record in group.records() if record.over_frozen}
    assert ratios == {"frozen": 1.0, "torch": 1.5}


def test_each_phase_times_what_it_is_called_after() -> None:
    """The forward builds no graph, the backward computes none of the forward, and both together compute both."""
    leaf, log = torch.ones(3, requires_grad=True), []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            log.append("forward")
            return 2 * t

        @staticmethod
        def backward(ctx, grad):
            log.append("backward")
            return 2 * grad

    step, dy = Step(lambda: Product.apply(leaf), (Leaf(leaf, "x"),)), torch.ones(3)
    for phase, expected in {
        "forward": ["forward"], "backward": ["backward"], "forward+backward": ["forward", "backward"],
    }.items():  # fmt: skip
        call = measure.call_of(step, dy, phase)
        log.clear()
        result = call()
        assert log == expected
        assert not getattr(result, "requires_grad", False)
