"""Triton plans against the chips they are for: shared memory, long fp32 sums, when one pass or grouping is chosen."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs
from lmoe_kernels.backends.triton.configs import Chip, Tile
from lmoe_kernels.options import Options, Sizes
from tests.triton.chips import CHIPS, H200

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
        if tile.chunk == 0:
            yield "expand: v and factor", tile, (tile.T + tile.F) * tile.ER
            yield "expand: dlogits and gate", tile, (tile.T + tile.F) * tile.E
        else:
            yield "expand in chunks: factor and gate", tile, tile.F * (tile.ER + tile.E)
    for heights in ((sizes.E * sizes.R, sizes.E), (sizes.E * sizes.R,), (sizes.E,)):
        tile = configs.wgrad_plan(sizes.T, sizes.I, heights, dtype, chip).tile
        yield "wgrad: rows and coefficients", tile, (tile.F + tile.ER + (tile.E if len(heights) == 2 else 0)) * tile.T
    groups = configs.grouped_plan(sizes, Options(top_k=2), dtype, chip)
    if groups is not None:
        yield "grouped shrink", groups.shrink, (groups.shrink.T + groups.shrink.ER) * groups.shrink.F
        yield "grouped wgrad", groups.wgrad, (groups.wgrad.F + groups.wgrad.ER) * groups.wgrad.T
        yield "gate alone", groups.gate, (groups.gate.T + groups.gate.ER + groups.gate.E) * groups.gate.F
        yield "grouped expand", groups.expand, groups.expand.F * groups.expand.ER


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


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_an_expand_in_chunks_holds_all_columns_next_to_its_stages(chip: Chip) -> None:
    """NVIDIA's compiler also keeps a tile of the result there; AMD's keeps that, and one of the stages, in registers."""
    on_amd, found = chip.arch.startswith("gfx"), set()
    for sizes in ALL:
        forward, backward = (plan(sizes, torch.bfloat16, chip) for plan in (configs.forward_plan, configs.backward_plan))
        for tile in (forward.expand, backward.expand):
            if tile.chunk == 0:
                assert sizes.E * sizes.R > 64, f"{sizes} on {chip.arch}: {tile}"
                continue
            columns, found = tile.ER + tile.E, found | {tile.ER}
            result = 0 if on_amd else tile.T * tile.F
            elements = tile.T * columns + (tile.stages - on_amd) * columns * tile.F + result
            assert 2 * elements <= 0.9 * chip.shared_memory, f"{sizes} on {chip.arch}: {tile}"
            assert tile.ER >= sizes.E * sizes.R
            assert tile.E >= sizes.E
            assert tile.chunk % tile.F == 0
    assert max(found) >= 128


@pytest.mark.parametrize("features", [1, 64, 65, 640, 4096, 14336])
@pytest.mark.parametrize("chunk", [0, 64, 256, 1024])
def test_chunks_cover_the_features_and_are_about_equal(features: int, chunk: int) -> None:
    tile = Tile(T=16, F=64, ER=16, chunk=chunk)
    chunks, steps = tile.chunks(features)
    assert steps * tile.F <= max(chunk, tile.F)
    assert chunks * steps * tile.F >= features
    assert (chunks - 1) * steps * tile.F < features, "a chunk without features"
    assert chunks <= configs.ceil_div(features, max(chunk, tile.F)), "more chunks than are needed"


@pytest.mark.parametrize("tokens", [512, 1024, 2048, 4096, 8192, 65536])
def test_each_processor_has_two_programs_of_expand(tokens: int) -> None:
    """One of them loads while the other one writes."""
    tile = configs.forward_plan(Sizes(tokens, 4096, 4096, 8, 16, 8), torch.bfloat16, H200).expand
    assert tile.tiles_of(tokens) * tile.chunks(4096)[0] > 7 / 8 * 2 * H200.processors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_one_pass_is_taken_only_where_it_fits(chip: Chip, dtype: torch.dtype) -> None:
    taken = 0
    for sizes in ALL:
        plan = configs.forward_plan(sizes, dtype, chip)
        if plan.one_pass is None:
            continue
        tile, taken = plan.one_pass, taken + 1
        v, b, y = tile.T * tile.ER, tile.stages * tile.ER * tile.F, tile.T * tile.F
        assert (v + b + y) * dtype.itemsize <= chip.shared_memory, f"{sizes} on {chip.arch}: {tile}"
        assert tile.ER >= sizes.E * sizes.R
        assert plan.splits == 1
        assert sizes.I == 512 or 2 * tile.tiles_of(sizes.T) >= chip.processors, "half of the chip is idle for long"
    assert taken


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_many_tokens_take_one_pass_and_few_take_splits(chip: Chip) -> None:
    """In 64 KB of shared memory one pass has 64 tokens, and loads more from the L2 than two kernels on 128 tokens do."""
    sizes = Sizes(8 * 128 * chip.processors, 4096, 4096, 8, 16, 8)
    one_pass = configs.forward_plan(sizes, torch.bfloat16, chip).one_pass is not None
    assert one_pass == (chip.shared_memory > 64 << 10)
    assert configs.forward_plan(sizes._replace(T=16), torch.bfloat16, chip).splits == 16


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
