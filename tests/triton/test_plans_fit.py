"""Triton plans against the chips they are for: shared memory, long fp32 sums, when one pass or grouping is chosen."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs, hopper
from lmoe_kernels.backends.triton.plans import Chip, Tile, WgradPlan
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
    """A tenth is left for what the compiler keeps there itself; of AMD's two stages one is in registers.

    On Hopper four stages of 128 features, with 64 tokens and 128 columns, take more: they were timed so.
    """
    full, timed = 0.0, Tile(T=64, F=128, ER=128, stages=4)
    for sizes in ALL:
        for kernel, tile, elements in _steps(sizes, dtype, chip):
            taken = (tile.stages - chip.arch.startswith("gfx")) * elements * dtype.itemsize / chip.shared_memory
            most = 0.92 if chip == H200 and replace(tile, R=timed.R) == timed else 0.9
            assert taken <= most, f"{kernel} of {sizes}: {taken:.2f} of {chip.arch}, {tile}"
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
    assert bool(taken) == (not hopper.covers(dtype, chip))


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_many_tokens_take_no_splits_and_few_take_many(chip: Chip) -> None:
    """In 64 KB of shared memory one pass has 64 tokens, and loads more from the L2 than two kernels on 128 tokens do.

    On Hopper one pass was nowhere faster than the stages.
    """
    sizes = Sizes(8 * 128 * chip.processors, 4096, 4096, 8, 16, 8)
    plan = configs.forward_plan(sizes, torch.bfloat16, chip)
    assert (plan.one_pass is not None) == (chip.shared_memory > 64 << 10 and chip != H200)
    assert plan.splits == 1
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


HEIGHTS = [(1,), (16,), (64,), (128,), (1024,), (16, 1), (64, 8), (128, 8), (128, 16), (64, 64)]  # of wgrad: ER, or ER and E
FEATURES = (1, 512, 2051, 4096, 11008, 14336, 28672)
TOKENS = (0, 1, 511, 2048, 8192, 10_000, 65_536)


def _wgrads(dtype: torch.dtype, chip: Chip) -> Iterator[tuple[tuple[int, int, tuple[int, ...]], WgradPlan]]:
    for sizes in product(TOKENS, FEATURES, HEIGHTS):
        yield sizes, configs.wgrad_plan.__wrapped__(*sizes, dtype, chip)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_the_splits_of_a_weight_gradient_have_all_tokens_and_each_has_some(chip: Chip, dtype: torch.dtype) -> None:
    for sizes, plan in _wgrads(dtype, chip):
        T, splits = sizes[0], plan.splits
        assert (splits - 1) * plan.tokens < max(T, 1) <= splits * plan.tokens, sizes
        assert splits == 1 or plan.tokens % plan.tile.T == 0, f"{sizes}: a tile of two splits"
        assert splits == 1 or dtype == torch.float32 or plan.tokens >= 512, f"{sizes}: many partial sums of few tokens"
        assert plan == configs.wgrad_plan(*sizes, dtype, chip), "a pure function"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_256_features_of_a_weight_gradient_only_where_they_compile_and_win_by_bytes(chip: Chip, dtype: torch.dtype) -> None:
    """Elsewhere their accumulators spill; one program for each tile of 128 features, in one wave, loads at least as much.

    On Hopper they were slower, as were splits of less than 1024 tokens with more than 128 rows; up to 128 rows the plan
    follows times.
    """
    wide = 0
    for sizes, plan in _wgrads(dtype, chip):
        tokens, features, heights = sizes
        if hopper.covers(dtype, chip):
            assert plan.tile.F <= 128
            if hopper.is_narrow(plan.tile):
                continue
        tile = replace(plan.tile, F=min(plan.tile.F, 128))
        programs = configs.ceil_div(features, tile.F) * configs.ceil_div(heights[0], tile.ER)
        least = configs.ceil_div(tokens, 2048) if dtype == torch.float32 else 1
        fewest = 1024 if hopper.covers(dtype, chip) and tile.ER > 128 else 512
        splits = max(1, min(chip.processors // programs, tokens // fewest), least)
        of_split = max(1, configs.ceil_div(tokens, splits * tile.T)) * tile.T
        one_wave = WgradPlan(tile, max(1, configs.ceil_div(tokens, of_split)), of_split)
        taken, other = (configs.wgrad_bytes(one, features, heights, dtype, chip) for one in (plan, one_wave))
        assert taken <= other, sizes
        if plan.tile.F > 128:
            wide += 1
            assert taken < other, sizes
            assert plan.tile.F == 256
            assert plan.tile.ER <= 128
            assert len(heights) == 1 or heights[1] <= 16
    assert bool(wide) == (chip.arch == "sm_100" and dtype == torch.bfloat16)


def test_programs_of_a_narrow_weight_gradient_on_hopper() -> None:
    """Two to a processor in tiles of 64 features, one in tiles of 128; twice as many splits would be more, or too short."""
    seen = set()
    for (_, features, heights), plan in _wgrads(torch.bfloat16, H200):
        if not hopper.is_narrow(plan.tile):
            continue
        seen.add(plan.tile.F)
        most = {64: 2, 128: 1}[plan.tile.F] * H200.processors
        programs = configs.ceil_div(features, plan.tile.F) * configs.ceil_div(heights[0], plan.tile.ER)
        assert plan.splits == 1 or programs * plan.splits <= most
        assert 2 * programs * plan.splits > most or plan.tokens < 2048 or plan.splits == 1
        assert plan.tile.F == 128 or plan.tokens <= 2048, "many tokens of a split are faster in tiles of 128 features"
    assert seen == {64, 128}


@pytest.mark.parametrize(
    "tokens, features, tile_features, splits",
    [(8192, 4096, 64, 4), (8192, 11008, 128, 1), (8192, 14336, 128, 1), (65_536, 14336, 128, 1), (8192, 28672, 128, 1)],
)
def test_weight_gradients_of_common_layers_on_hopper(tokens: int, features: int, tile_features: int, splits: int) -> None:
    """With eight experts of 16 ranks; 4096 and 14336 features were timed, the others follow the same rule."""
    plan = configs.wgrad_plan(tokens, features, (128, 8), torch.bfloat16, H200)
    assert (plan.tile.F, plan.splits) == (tile_features, splits)


@pytest.mark.parametrize("experts, rank", [(1, 16), (8, 16), (8, 32), (8, 64), (16, 64), (64, 16), (128, 8)])
@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 300, 1024, 2048, 3000, 4096, 8192, 8448, 12_000, 65_536])
def test_splits_of_a_shrink_on_hopper_leave_a_processor_for_each_program(tokens: int, experts: int, rank: int) -> None:
    """Where all columns fit one tile, or where programs of 64 or 128 tokens fill the chip; elsewhere the model decides."""
    sizes = Sizes(tokens, 4096, 4096, experts, rank, experts)
    for plan in (configs.forward_plan(sizes, torch.bfloat16, H200), configs.backward_plan(sizes, torch.bfloat16, H200)):
        tile, columns = plan.shrink, configs.ceil_div(experts * rank, plan.shrink.ER)
        programs = tile.tiles_of(tokens) * plan.splits * (columns if plan.splits > 1 else 1)
        if hopper.is_narrow(tile):
            assert tile.T == 64
            assert plan.splits == 1 or programs <= H200.processors
            assert 2 * programs > H200.processors or plan.splits == 4096 // (4 * tile.F)
        elif experts <= 64 and 110 <= configs.ceil_div(tokens, 64) <= H200.processors:
            assert (tile.T, plan.splits) == (64, 1), "no splits where one tile of 64 tokens has a processor"


@pytest.mark.parametrize("features", [2048, 4096, 14336])
def test_weight_gradients_of_lengths_that_vary_meet_few_kernels(features: int) -> None:
    """A kernel is compiled for each tile, and for partial sums as for results."""
    kinds = set()
    for T in range(1, 16385, 16):
        plan = configs.wgrad_plan.__wrapped__(T, features, (128, 8), torch.bfloat16, H200)
        kinds.add((plan.tile, plan.splits > 1))
    assert len(kinds) <= 4
