"""The plans for Hopper against those that were timed on an H200: each was timed, and few were faster, by little."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs
from lmoe_kernels.backends.triton.plans import BackwardPlan, ForwardPlan, Tile, WgradPlan
from lmoe_kernels.options import Sizes
from tests.triton.chips import H200

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200" / "plans.jsonl"
MACHINE, *LINES = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
TIMES: dict[tuple[str, tuple[int, ...]], dict[tuple[int | None, Tile], float]] = {}
for line in LINES:
    runs = defaultdict(list)
    for us, splits, tile in line["plans"]:
        runs[splits, Tile(*tile)].append(us)
    TIMES[line["what"], tuple(line["shape"])] = {plan: mean(times) for plan, times in runs.items()}


def sizes_of(shape: tuple[int, ...]) -> Sizes:
    T, I, O, E, R = shape  # noqa: E741
    return Sizes(T, I, O, E, R, E)


def chosen(what: str, shape: tuple[int, ...]) -> ForwardPlan | BackwardPlan | WgradPlan:
    T, I, O, E, R = shape  # noqa: E741
    if what == "wgrad_plan":
        return configs.wgrad_plan(T, O, (E * R,), torch.bfloat16, H200)
    if what == "wgrad_plan.pair":
        return configs.wgrad_plan(T, I, (E * R, E), torch.bfloat16, H200)
    return getattr(configs, what.partition(".")[0])(sizes_of(shape), torch.bfloat16, H200)


def test_where_the_times_come_from() -> None:
    assert MACHINE["device"] == "NVIDIA H200"
    assert MACHINE.keys() >= {"torch", "triton", "driver", "date", "us"}
    assert {what for what, _ in TIMES} == {
        f"{plan}.{stage}" for plan in ("forward_plan", "backward_plan") for stage in ("shrink", "expand")
    } | {"forward_plan.one_pass", "wgrad_plan", "wgrad_plan.pair"}


@pytest.mark.parametrize("what, shape", [key for key in TIMES if not key[0].endswith("one_pass")], ids=str)
def test_the_choice_was_timed_and_is_among_the_fastest(what: str, shape: tuple[int, ...]) -> None:
    """At most 5 % slower than the fastest; the medians of two runs of one plan differ by up to 4 %."""
    times, plan = TIMES[what, shape], chosen(what, shape)
    if isinstance(plan, WgradPlan):
        key: tuple[Any, Tile] = plan.splits, plan.tile
    else:
        assert getattr(plan, "one_pass", None) is None
        key = (plan.splits, plan.shrink) if what.endswith("shrink") else (None, plan.expand)
    assert key in times, f"not timed: {key}"
    fastest = min(times, key=times.__getitem__)
    assert times[key] <= 1.05 * times[fastest], f"{times[key]:.1f} us for {key}, {times[fastest]:.1f} for {fastest}"


@pytest.mark.parametrize("shape", [shape for what, shape in TIMES if what.endswith("one_pass")], ids=str)
def test_one_pass_is_not_taken_since_it_was_nowhere_faster(shape: tuple[int, ...]) -> None:
    """By more than 1 %, where 16384 tokens were timed."""
    plan = configs.forward_plan(sizes_of(shape), torch.bfloat16, H200)
    assert plan.one_pass is None
    stages = TIMES["forward_plan.shrink", shape][plan.splits, plan.shrink]
    assert stages <= 1.01 * min(TIMES["forward_plan.one_pass", shape].values())
