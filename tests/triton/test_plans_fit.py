"""Triton plans against the chips they are for: shared memory, long fp32 sums, when one pass or grouping is chosen."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs
from lmoe_kernels.backends.triton.configs import Chip, Tile
from lmoe_kernels.options import Options, Sizes
from tests.triton.chips import CHIPS

DTYPES = [torch.bfloat16, torch.float32]
ALL = [
    Sizes(T, features, features, E, R, E)
    for T, features, E, R in product(
        (16, 300, 8192, 200_000), (512, 4096), (1, 2, 8, 16, 32, 64, 128, 256), (1, 4, 8, 16, 32, 64, 128, 300)
    )
]


def _steps(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> Iterator[tuple[str, Tile, int]]:
    """Each kernel with a loop of dots: its tile, and the elements that one step of the loop loads."""
    forward, backward = (plan(sizes, dtype, chip) for plan in (configs.forward_plan, configs.backward_plan))
    for tile in (forward.shrink, backward.shrink):
        yield "shrink: rows, factor and gate", tile, (tile.T + tile.ER + tile.E) * tile.F
    for tile in (forward.expand, backward.expand):
        yield "expand: v and factor", tile, (tile.T + tile.F) * tile.ER
        yield "expand: dlogits and gate", tile, (tile.T + tile.F) * tile.E
    for heights in ((sizes.E * sizes.R, sizes.E), (sizes.E * sizes.R,), (sizes.E,)):
        tile = configs.wgrad_plan(sizes.T, sizes.I, heights, dtype, chip).tile
        yield "wgrad: rows and coefficients", tile, (tile.F + tile.ER + (tile.E if len(heights) == 2 else 0)) * tile.T
    groups = configs.grouped_plan(sizes, Options(top_k=2), dtype, chip)
    if groups is not None:
        yield "grouped shrink", groups.shrink, (groups.shrink.T + groups.shrink.ER) * groups.shrink.F
        yield "grouped wgrad", groups.wgrad, (groups.wgrad.F + groups.wgrad.ER) * groups.wgrad.T
        yield "gate alone", groups.gate, (groups.gate.T + groups.gate.ER + groups.gate.E) * groups.gate.F
        yield "gate's expand", groups.gate_expand, (groups.gate_expand.T + groups.gate_expand.F) * groups.gate_expand.ER


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_the_stages_of_every_loop_fit_the_shared_memory(chip: Chip, dtype: torch.dtype) -> None:
    """A tenth is left for what the compiler keeps there itself. Of AMD's two stages one is in registers."""
    full = 0.0
    for sizes in ALL:
        for kernel, tile, elements in _steps(sizes, dtype, chip):
            taken = (tile.stages - chip.arch.startswith("gfx")) * elements * dtype.itemsize / chip.shared_memory
            assert taken <= 0.9, f"{kernel} of {sizes}: {taken:.2f} of {chip.arch}, {tile}"
            full = max(full, taken)
    assert full > 0.5, "nothing here comes near the limit"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_one_pass_is_taken_where_it_fits_and_fills_three_quarters_of_the_chip(chip: Chip, dtype: torch.dtype) -> None:
    taken = 0
    for sizes in ALL:
        plan = configs.forward_plan(sizes, dtype, chip)
        if plan.one_pass is None:
            continue
        tile, taken = plan.one_pass, taken + 1
        v, b, y = tile.T * tile.ER, tile.stages * tile.ER * tile.F, tile.T * tile.F
        assert (v + b + y) * dtype.itemsize <= chip.shared_memory, f"{sizes} on {chip.arch}: {tile}"
        assert tile.ER >= sizes.E * sizes.R
        assert 4 * tile.tiles_of(sizes.T) >= 3 * chip.processors
    assert taken


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_the_least_tokens_of_one_pass(chip: Chip) -> None:
    tiles = configs.ceil_div(3 * chip.processors, 4)
    sizes = Sizes(64 * tiles, 4096, 4096, 8, 16, 8)
    assert configs.forward_plan(sizes, torch.bfloat16, chip).one_pass is not None
    assert configs.forward_plan(sizes._replace(T=sizes.T - 64), torch.bfloat16, chip).one_pass is None


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_no_groups_where_all_experts_share_one_a(chip: Chip) -> None:
    """Their u is one for all of them, so that there is nothing to spare."""
    sizes = Sizes(8192, 4096, 4096, 64, 16, 64)
    assert configs.grouped_plan(sizes, Options(top_k=2), torch.bfloat16, chip) is not None
    assert configs.grouped_plan(sizes._replace(experts_of_a=1), Options(top_k=2), torch.bfloat16, chip) is None


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_no_sum_of_fp32_runs_over_more_than_1024_features(chip: Chip) -> None:
    for sizes in ALL:
        forward, backward = (plan(sizes, torch.float32, chip) for plan in (configs.forward_plan, configs.backward_plan))
        for splits, features in ((forward.splits, sizes.I), (backward.splits, sizes.O)):
            assert features <= 1024 * splits, f"{sizes} on {chip.arch}: {splits} splits"
