"""The model by which plans are chosen: its formulas against the bytes that kernels load and store, and what it prefers."""

from collections import defaultdict
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs, cost, host
from lmoe_kernels.backends.triton.cost import Traffic
from lmoe_kernels.backends.triton.plans import BackwardPlan, Chip, ForwardPlan, Tile
from lmoe_kernels.options import Options, Sizes
from tests.problems import Case, make_problem
from tests.triton.chips import CHIPS, H200
from tools import calls
from tools.interpreter.bytes import counted

CHIP = Chip("interpreter", 4, 1 << 16)
WIDE, NARROW = Tile(T=32, F=32, ER=64), Tile(T=32, F=32, ER=16)
IN_CHUNKS, IN_BLOCKS = Tile(T=32, F=64, ER=64, chunk=128), Tile(T=64, F=32, ER=16)  # the second holds not all columns
MIX = Tile(T=16, F=16, ER=64)
PLANS = {
    "one pass": (WIDE, 1, WIDE, IN_CHUNKS),
    "shrink and mix in one kernel": (None, 1, WIDE, IN_CHUNKS),
    "the same, with columns in tiles": (None, 1, NARROW, IN_BLOCKS),
    "splits": (None, 2, WIDE, IN_BLOCKS),
    "splits, with columns in tiles": (None, 4, NARROW, IN_CHUNKS),
}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The programs of each kernel that is launched."""
    found: dict[str, int] = {}
    launch = host.launch

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        found[kernel.fn.__name__] = prod(grid)
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(host, "launch", record)
    return found


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_formulas_are_what_kernels_load_and_store(
    plan: tuple, programs: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_pass, splits, shrink, expand = plan
    case = Case(T=70, I=300, O=330, E=5, R=8)
    sizes, dtype = Sizes(case.T, case.I, case.O, case.E, case.R, case.E), torch.bfloat16
    forward, backward = ForwardPlan(one_pass, splits, shrink, MIX, expand), BackwardPlan(splits, shrink, MIX, expand)
    monkeypatch.setattr(configs, "forward_plan", lambda *_: forward)
    monkeypatch.setattr(configs, "backward_plan", lambda *_: backward)
    problem = make_problem(case, dtype)
    x, factors = problem.tensors["x"], calls.factors_of(problem.tensors)

    with counted() as counts:
        _, saved = calls.forward_saved("triton", x, factors, Options())
    _compare(configs.forward_kernels(forward, sizes, dtype, CHIP), counts, programs)
    programs.clear()
    with counted() as counts:
        calls.backward("triton", problem.dy, x, factors, saved, Options(), dlogits=problem.dlogits)
    _compare(configs.backward_kernels(backward, sizes, dtype, CHIP), counts, programs)


def _compare(modelled: dict[str, Traffic], counts: dict, programs: dict[str, int]) -> None:
    loaded, stored = defaultdict(int), defaultdict(int)
    for access, count in counts.items():
        loaded[access.kernel] += count.loaded
        stored[access.kernel] += count.stored
    of_weights = {kernel for kernel in programs if "wgrad" in kernel or "reduce" in kernel or "cast" in kernel}
    assert set(modelled) == set(programs) - of_weights
    for kernel, traffic in modelled.items():
        assert (traffic.loaded, traffic.stored) == (loaded[kernel], stored[kernel]), kernel
        assert traffic.programs == programs[kernel], kernel


CHOSEN = {  # by the model: the tokens of a tile, and the splits, for each number of tokens
    "sm_80": {512: (64, 8), 1024: (128, 8), 4096: (128, 2), 8192: (128, 1), 65536: (128, 1)},
    "sm_100": {512: (64, 16), 1024: (64, 8), 4096: (128, 4), 8192: (128, 2), 65536: (128, 1)},
}


@pytest.mark.parametrize("arch, tokens", [(arch, tokens) for arch in CHOSEN for tokens in CHOSEN[arch]])
def test_the_choice_does_not_depend_on_the_assumed_rates(arch: str, tokens: int) -> None:
    """With an H100's or an H200's memory, and the lowest or highest rate published for the L2, it loses at most 2 %."""
    chip = next(chip for chip in CHIPS if chip.arch == arch)
    sizes, dtype = Sizes(tokens, 4096, 4096, 8, 16, 8), torch.bfloat16
    chosen = configs.forward_plan(sizes, dtype, chip)
    assert (chosen.shrink.T, chosen.splits) == CHOSEN[arch][tokens]
    ways = configs.shrinks(sizes, 4096, 128, dtype, chip)
    plans = [replace(chosen, shrink=tile, splits=splits, one_pass=None) for tile, splits in ways]
    plans += [replace(chosen, shrink=tile, splits=1, one_pass=tile) for tile, splits in ways if splits == 1]
    assert len(plans) > 2
    for memory, l2 in product((3.0e12, 4.3e12), (5.5e12, 7.0e12)):
        rates = cost.H100._replace(memory=memory / 132, l2=l2 / 132)

        def seconds(plan: ForwardPlan, rates: cost.Rates = rates) -> float:
            kernels = configs.forward_kernels(plan, sizes, dtype, chip).values()
            return sum(kernel.seconds(chip.processors, rates) for kernel in kernels)

        assert seconds(chosen) <= 1.02 * min(map(seconds, plans))


@pytest.mark.parametrize(
    "tokens, shrink",
    [(512, (64, 64, 16)), (1024, (64, 128, 8)), (4096, (64, 128, 2)), (8192, (64, 128, 1)), (65536, (64, 64, 1))],
)
def test_on_hopper_times_decide_and_not_the_model(tokens: int, shrink: tuple[int, int, int]) -> None:
    """Of up to 128 columns one plan is left to choose from."""
    sizes, dtype = Sizes(tokens, 4096, 4096, 8, 16, 8), torch.bfloat16
    chosen = configs.forward_plan(sizes, dtype, H200)
    assert (chosen.shrink.T, chosen.shrink.F, chosen.splits) == shrink
    assert configs.shrinks(sizes, 4096, 128, dtype, H200) == [(chosen.shrink, chosen.splits)]


def test_large_partial_sums_pass_through_memory() -> None:
    """Each split of 8192 tokens has 4.25 MB of them, of which the L2 keeps 24."""
    few, many = (cost.shrink(8192, 4096, 128, 8, 128, 128, splits, 2) for splits in (4, 8))
    assert few.stored < cost.KEPT < many.stored
    assert many.memory - few.memory == many.stored
    of_few, of_many = (cost.mix_fwd(8192, 128, 128, 8, 4, splits, 2) for splits in (4, 8))
    assert of_many.memory - of_few.memory == many.stored


def test_seconds() -> None:
    """Worked out by hand for 4 processors."""
    rates, one = cost.Rates(memory=100, l2=200, launch=1, wave=2), Traffic(programs=4, loaded=1600, stored=400, memory=1600)
    assert one.seconds(4, rates) == 4 + 2 + 1
    assert one._replace(stored=2400).seconds(4, rates) == 5 + 2 + 1
    assert one._replace(programs=1).seconds(4, rates) == 10 + 2 + 1, "the L2 gives one processor its share alone"
    assert one._replace(programs=1, memory=2400).seconds(4, rates) == 15 + 2 + 1, "which draws 160 bytes from memory"
    assert one._replace(programs=5).seconds(4, rates) == 4 + 2 * 2 + 1, "two waves, and 2.5 processors at work"
    assert one._replace(programs=5, slots=2).seconds(4, rates) == 4 + 2 + 1, "one wave"
    assert one._replace(programs=0).seconds(4, rates) == 0
