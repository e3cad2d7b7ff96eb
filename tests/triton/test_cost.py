"""The model by which plans are chosen: its formulas against the bytes that kernels load and store, and what it prefers."""

from collections import defaultdict
from math import prod
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs, cost, host
from lmoe_kernels.backends.triton.configs import BackwardPlan, Chip, ForwardPlan, Tile
from lmoe_kernels.backends.triton.cost import Traffic
from lmoe_kernels.options import Options, Sizes
from tests.problems import Case, make_problem
from tests.triton.chips import H200
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
@pytest.mark.parametrize("tokens", [70, 1])
def test_formulas_are_what_kernels_load_and_store(
    plan: tuple, tokens: int, programs: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_pass, splits, shrink, expand = plan
    case = Case(T=tokens, I=300, O=330, E=5, R=8)
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
