# SPDX-License-Identifier: Apache-2.0
"""Which kernels run, and on which tiles: pure functions of the sizes, the dtype and the chip.

Which tiles there are follows from registers, spills and shared memory, read from the machine code by `python -m
benchmarks.inspect.static`. Of the plans with these tiles, the one is taken that `cost.py` models as fastest, from bytes and
from the number of programs; for Hopper's chips in half precision `hopper.py` narrows the choice to what was fastest when it
was timed. No other chip was timed. `make gpu` times the tiles of `SEARCH_SPACE` around each choice.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from lmoe_kernels.backends.triton import cost, hopper
from lmoe_kernels.backends.triton.cost import Traffic, ceil_div
from lmoe_kernels.backends.triton.plans import BackwardPlan, Chip, ForwardPlan, GroupedPlan, Tile, WgradPlan
from lmoe_kernels.options import Options, Sizes

REDUCE_TILE = Tile(T=16, F=1024, ER=16)  # of the kernel that adds up partial sums, whose speed depends on memory alone

SLOTS_OF_MIX = 8  # small programs without dots
cached_plan = lru_cache(maxsize=4096)  # making a plan takes some 0.2 ms, as long as ten launches

# The tiles that `make gpu` times around a choice; blocks of E, ER and R follow from the sizes.
SEARCH_SPACE = {
    "T": (64, 128),
    "F": (64, 128, 256),  # rows of 32 are 64 bytes in bf16, half of what memory gives at once
    "warps": (4, 8),
    "stages": (3, 4),
}


@cached_plan
def forward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> ForwardPlan:
    """Which forward kernels run, on which tiles: of all that fit, those modelled as fastest."""
    columns, ER = sizes.experts_of_a * sizes.R, sizes.E * sizes.R
    mix, expand = mix_tile(sizes, chip), expand_tile(sizes, ER, sizes.O, dtype, chip)
    plans = []
    for tile, splits in shrinks(sizes, sizes.I, columns, dtype, chip):
        # One pass holds all E R rows of both factors in one tile, and has one program for each tile of tokens.
        fits = columns == ER <= tile.ER and one_pass_bytes(tile, dtype) <= chip.shared_memory
        if splits == 1 and fits and not hopper.covers(dtype, chip):
            plans.append(ForwardPlan(tile, 1, tile, mix, expand))
        plans.append(ForwardPlan(None, splits, tile, mix, expand))
    return min(plans, key=lambda plan: seconds_of(forward_kernels(plan, sizes, dtype, chip), chip))


@cached_plan
def backward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> BackwardPlan:
    """Which backward kernels run before the weight gradients, on which tiles, likewise."""
    mix, expand = mix_tile(sizes, chip), expand_tile(sizes, sizes.experts_of_a * sizes.R, sizes.I, dtype, chip)
    plans = [
        BackwardPlan(splits, tile, mix, expand) for tile, splits in shrinks(sizes, sizes.O, sizes.E * sizes.R, dtype, chip)
    ]
    return min(plans, key=lambda plan: seconds_of(backward_kernels(plan, sizes, dtype, chip), chip))


def forward_kernels(plan: ForwardPlan, sizes: Sizes, dtype: torch.dtype, chip: Chip) -> dict[str, Traffic]:
    """The kernels of a forward that computes all experts, with a gate, and what they move."""
    T, columns, ER, size = sizes.T, sizes.experts_of_a * sizes.R, sizes.E * sizes.R, dtype.itemsize
    sums = 0 if plan.splits == 1 else plan.splits  # of partial sums in memory
    shrink = cost.shrink(T, sizes.I, columns, sizes.E, plan.shrink.T, plan.shrink.ER, sums, size)
    shrink = shrink._replace(slots=slots_of(shrink_bytes(plan.shrink, dtype), chip))
    mix = cost.mix_fwd(T, columns, ER, sizes.E, plan.mix.T, sums, size)._replace(slots=SLOTS_OF_MIX)
    expand = expand_traffic(plan.expand, T, sizes.O, ER, 0, dtype, chip)
    if plan.one_pass is not None:
        one_chunk = cost.expand(T, sizes.O, ER, 0, plan.one_pass.T, 1, 1, size)
        return {"_one_pass_fwd_kernel": cost.fused(shrink, mix, one_chunk)}
    if not sums:
        return {"_shrink_mix_fwd_kernel": cost.fused(shrink, mix), "_expand_fwd_kernel": expand}
    return {"_shrink_fwd_kernel": shrink, "_mix_fwd_kernel": mix, "_expand_fwd_kernel": expand}


def backward_kernels(plan: BackwardPlan, sizes: Sizes, dtype: torch.dtype, chip: Chip) -> dict[str, Traffic]:
    """Likewise of a backward, but for the weight gradients, whose tiles do not depend on the plan."""
    T, columns, ER, size = sizes.T, sizes.experts_of_a * sizes.R, sizes.E * sizes.R, dtype.itemsize
    sums = 0 if plan.splits == 1 else plan.splits
    shrink = cost.shrink(T, sizes.O, ER, 0, plan.shrink.T, plan.shrink.ER, sums, size)
    shrink = shrink._replace(slots=slots_of(shrink_bytes(plan.shrink, dtype), chip))
    mix = cost.mix_bwd(T, columns, ER, sizes.E, plan.mix.T, sums, size)._replace(slots=SLOTS_OF_MIX)
    expand = expand_traffic(plan.expand, T, sizes.I, columns, sizes.E, dtype, chip)
    if not sums:
        return {"_shrink_mix_bwd_kernel": cost.fused(shrink, mix), "_expand_fwd_kernel": expand}
    return {"_shrink_fwd_kernel": shrink, "_mix_bwd_kernel": mix, "_expand_fwd_kernel": expand}


def expand_traffic(tile: Tile, T: int, F: int, columns: int, gate: int, dtype: torch.dtype, chip: Chip) -> Traffic:
    """What expand moves of tokens with so many columns, and with those of the gate."""
    chunks, steps = tile.chunks(F)
    loads = chunks * (1 if columns <= tile.ER else steps)
    traffic = cost.expand(T, F, columns, gate, tile.T, chunks, loads, dtype.itemsize)
    # with mma.sync a program of 8 warps takes more than half of the registers
    return traffic._replace(slots=1 if uses_mma_sync(chip) else slots_of(expand_bytes(tile, dtype, chip), chip))


def seconds_of(kernels: dict[str, Traffic], chip: Chip) -> float:
    """The modelled time of kernels that run one after another. In the interpreter a kernel itself costs nothing."""
    rates = cost.H100._replace(launch=0, wave=0) if chip.arch == "interpreter" else cost.H100
    return sum(kernel.seconds(chip.processors, rates) for kernel in kernels.values())


def slots_of(bytes_of_program: int, chip: Chip) -> int:
    """Programs that a processor runs at once: two, where they have the shared memory; more would share its registers."""
    return 2 if 2 * bytes_of_program <= chip.shared_memory else 1


@cached_plan
def grouped_plan(sizes: Sizes, options: Options, dtype: torch.dtype, chip: Chip) -> GroupedPlan | None:
    """The tiles for tokens grouped by expert, or None where computing all experts costs no more.

    Grouped, x is read once by the gate and once by each slot, and y is written by the first slot and read and written by
    each further one: `2 I (1 + k) + 2 O (2 k - 1)` bytes a token against `2 I + 2 O`. That pays only where
    `Options.may_group` holds, and where the tiles, of which each expert's last is on average half empty, take less than half
    the work.
    """
    if not options.may_group(sizes) or sizes.R > 128:
        return None
    shrink = Tile(T=64, F=64, ER=block_of(sizes.R), E=block_of(sizes.E), R=block_of(sizes.R, 1, 64))
    route = replace(shrink, T=min(64, 4096 // shrink.E), warps=8)  # with 4 the masks of its logits spill on gfx942
    if chip.arch == "interpreter":
        route, shrink = replace(route, T=16), replace(shrink, T=16, F=32)
    elif dtype.itemsize > 2:
        shrink = replace(shrink, F=32, warps=8)
    if 2 * options.kept(sizes.E) * (sizes.T + shrink.T * sizes.E) > sizes.T * sizes.E:
        return None
    shrink = fit_stages(shrink, 4, lambda t: (t.T + t.ER) * t.F * dtype.itemsize, chip)
    return GroupedPlan(
        route,
        shrink,
        expand=replace(shrink, chunk=16 * shrink.F),
        wgrad=fit_stages(replace(shrink, F=2 * shrink.F), 4, lambda t: (t.F + t.ER) * t.T * dtype.itemsize, chip),
        gate=shrink_tiles(sizes._replace(E=1, R=sizes.E, experts_of_a=1), sizes.E, dtype, chip)[-1],
        gate_expand=expand_tile(sizes, sizes.E, sizes.I, dtype, chip),
    )


@cached_plan
def wgrad_plan(tokens: int, features: int, heights: tuple[int, ...], dtype: torch.dtype, chip: Chip) -> WgradPlan:
    """The tile and the splits of a weight gradient of `heights[0]` rows, and of the gate's of `heights[1]` where given.

    Of the tiles that compile without spills, and of as many splits as fill one wave of programs or a few, those with the
    least `wgrad_bytes`. 256 features halve the reads of the coefficients and need twice the splits; tcgen05 leaves enough
    registers for them.
    """
    experts = heights[1] if len(heights) == 2 else 1
    tile = Tile(
        T=64, F=128, ER=block_of(heights[0], most=widest(experts, dtype, chip)), E=block_of(experts, most=64), warps=8
    )
    tiles, waves, least = [tile], (1, 2, 3, 4), 512
    if chip.arch == "interpreter":
        tiles, waves, least = [replace(tile, T=32, F=64, ER=min(tile.ER, 64))], (1,), 32
    elif dtype.itemsize > 2:  # without tensor cores the operands take registers too
        tiles = [replace(tile, T=32, F=64)]
    elif tile.ER > 128 and chip.arch.startswith("gfx"):
        tiles = [replace(tile, F=64)]
    elif hopper.covers(dtype, chip) and hopper.is_narrow(tile):
        return hopper.wgrad_plan(tokens, features, heights[0], tile, chip)
    elif hopper.covers(dtype, chip) and tile.ER > 128:
        # With 512 rows and 1024 tokens 64 features took 14.3 us, 128 took 18.4, and in two splits 21.6 (an H200, 2026-11-26)
        tiles, least = [replace(tile, F=64), tile], 1024
    elif tile.ER <= 128 and tile.E == 16 and chip.arch.startswith("sm_10"):
        tiles = [tile, replace(tile, F=256)]
    plans = []
    for tile in tiles:
        tile = fit_stages(tile, 4, lambda t: (t.F + t.ER + t.E) * t.T * dtype.itemsize, chip)
        programs = ceil_div(features, tile.F) * ceil_div(heights[0], tile.ER)
        for most in waves:
            # With fewer than 512 tokens to a split the partial sums take more bytes than a fuller wave saves.
            splits = max(1, min(most * chip.processors // max(programs, 1), tokens // least))
            if dtype == torch.float32:
                # A running sum of 16384 tokens has an error of 19 epsilons, one of 2048 tokens 7 (simulated). The bytes of
                # further partial sums take little time next to the products. In half precision other rounding errors are
                # far larger.
                splits = max(splits, ceil_div(tokens, 2048))
            of_split = max(1, ceil_div(tokens, splits * tile.T)) * tile.T
            plans.append(WgradPlan(tile, max(1, ceil_div(tokens, of_split)), of_split))
    return min(plans, key=lambda plan: wgrad_bytes(plan, features, heights, dtype, chip))


def wgrad_bytes(plan: WgradPlan, features: int, heights: tuple[int, ...], dtype: torch.dtype, chip: Chip) -> int:
    """What a weight gradient loads, as if all processors had as many programs as the busiest one, and its partial sums.

    A program loads rows and coefficients, from the L2 if another program loads the same. Partial sums are written and read.
    """
    programs = ceil_div(features, plan.tile.F) * ceil_div(heights[0], plan.tile.ER) * plan.splits
    columns = plan.tile.F + plan.tile.ER + (plan.tile.E if len(heights) == 2 else 0)
    loaded = ceil_div(programs, chip.processors) * chip.processors * plan.tokens * columns * dtype.itemsize
    return loaded + (8 * plan.splits * sum(heights) * features if plan.splits > 1 else 0)


def shrinks(sizes: Sizes, features: int, columns: int, dtype: torch.dtype, chip: Chip) -> list[tuple[Tile, int]]:
    """The tiles for a shrink, each with every number of splits that may be taken with it."""
    ways = [(tile, n) for tile in shrink_tiles(sizes, columns, dtype, chip) for n in splits_of(tile, features, dtype)]
    return hopper.shrinks(ways, sizes.T, columns, chip) if hopper.covers(dtype, chip) else ways


def shrink_tiles(sizes: Sizes, columns: int, dtype: torch.dtype, chip: Chip) -> list[Tile]:
    """The tiles for the kernels that sum over features: x with A, dy with B.

    Tiles of 128 tokens halve the reads of A and B from the L2, which are `2 columns / 128` bytes for each byte of x in bf16.
    They are half as many, so that fewer tokens fill the chip only in splits. wgmma needs at least 64 tokens.
    """
    tile = Tile(
        T=64, F=64, ER=block_of(columns, most=widest(sizes.E, dtype, chip)), E=block_of(sizes.E), R=block_of(sizes.R, 1, 64)
    )
    if chip.arch == "interpreter":
        return [replace(tile, T=32, F=32, ER=min(tile.ER, 64))]
    if dtype.itemsize > 2:
        tiles = [replace(tile, T=64 if tile.E <= 32 else 32, F=32, warps=8)]
    else:
        if hopper.covers(dtype, chip) and tile.E <= 64:
            return hopper.shrink_tiles(tile, sizes.T, chip)
        tiles = [replace(tile, warps=8 if tile.ER + tile.E > 160 or uses_mma_sync(chip) else 4)]
        spills = tile.ER in (64, 256) and chip.arch.startswith("sm_10")  # 2 registers of 64 rows, 75 of 256
        tiles += [replace(tile, T=128, warps=8)] if tile.E <= 64 and sizes.T > 64 and not spills else []
    # fp32 keeps its operands in registers, like the accumulators: more than two stages spill (Triton 3.6 for sm_90)
    stages = 2 if dtype.itemsize > 2 else 4
    return [fit_stages(one, stages, lambda t: shrink_bytes(t, dtype) // t.stages, chip) for one in tiles]


def expand_tile(sizes: Sizes, columns: int, features: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """The tile of the kernel that multiplies columns up to features.

    Where the columns of a tile of tokens fit the shared memory, with two stages of the factor, a program holds them all and
    walks over a chunk of the features. Blocks of 64 features then let two programs share a processor (sm_90 and E R = 128:
    76 registers, 116 with a base). Wider ones save no traffic, since each program reads its part of the factor once in any
    case, and on sm_90 128 features take 171 registers with a base, and 256 spill.
    """
    tile = Tile(T=64, F=128, ER=block_of(columns, most=64), E=block_of(sizes.E, most=64), warps=8)  # 4 warps spill on sm_100
    if chip.arch == "interpreter":
        return with_chunk(replace(tile, T=32, F=64), sizes.T, features, columns, dtype, chip)
    if dtype.itemsize > 2:
        tile = replace(tile, F=64, ER=min(tile.ER, 32), E=16)
    else:
        whole = replace(tile, F=64, ER=block_of(columns), E=block_of(sizes.E), warps=4)
        if sizes.T > 64:
            whole, tile = replace(whole, T=128, warps=8), replace(tile, T=128)
        for held in (replace(whole, stages=3), replace(whole, stages=2)):
            if columns <= 256 and 10 * expand_bytes(held, dtype, chip) <= 9 * chip.shared_memory:
                return with_chunk(held, sizes.T, features, columns, dtype, chip)
    return fit_stages(tile, 3, lambda t: (t.T + t.F) * max(t.ER, t.E) * dtype.itemsize, chip)


def with_chunk(tile: Tile, T: int, features: int, columns: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """The tile with the chunk of features that the model finds best.

    Chunks that leave more than an eighth of the places for programs empty are not considered: where a processor runs two
    programs, one loads while the other one writes, which the model does not know.
    """
    found = {}
    for chunk in (tile.F << i for i in range(6)):
        one = replace(tile, chunk=chunk)
        traffic = expand_traffic(one, T, features, columns, 0, dtype, chip)
        if not found or 8 * traffic.programs > 7 * traffic.slots * chip.processors:
            found[one] = seconds_of({"_expand_fwd_kernel": traffic}, chip)
    return min(found, key=found.__getitem__)


def mix_tile(sizes: Sizes, chip: Chip) -> Tile:
    """The tile of the mix as a kernel of its own: no dots, and few tokens, so that small batches make more programs."""
    return Tile(T=16 if chip.arch == "interpreter" else 4, F=16, ER=64, E=block_of(sizes.E), R=block_of(sizes.R, 1, 64))


@cached_plan
def dropout_tile(features: int) -> Tile:
    """The tile of dropout: as many whole rows as have about 2048 elements, 16 for each thread.

    Each thread computes the keys of all tokens of its tile, so that few tokens with many features cost the least.
    """
    width = block_of(features, most=2048)
    return Tile(T=2048 // width, F=width, ER=16)


def splits_of(tile: Tile, features: int, dtype: torch.dtype) -> list[int]:
    """The split-K factors that a shrink may have.

    Partial sums are written and read in fp32, `8 columns` bytes a token for each split, and need a further launch. A split
    has at least four steps of the loop. The number of splits is a power of two, because the mix unrolls its loop over them
    and is compiled again for each number. More than 128 experts are split in two, which gives the mix a kernel with a tile
    of its own: in one kernel with the shrink, on 64 tokens, their gates spill. In fp32 a split has at most 1024 features,
    whose sum has an error of 5 epsilons.
    """
    least = 1 if tile.E <= 128 else 2
    most = features // (4 * tile.F) if tile.E <= 128 else 2
    if dtype == torch.float32:
        least = max(least, block_of(ceil_div(features, 1024), least=1))
    numbers = [least]
    while 2 * numbers[-1] <= most:
        numbers.append(2 * numbers[-1])
    of_split = [max(1, ceil_div(features, n * tile.F)) * tile.F for n in numbers]  # whole steps, which may need fewer splits
    return list(dict.fromkeys(max(1, ceil_div(features, one)) for one in of_split))


def widest(experts: int, dtype: torch.dtype, chip: Chip) -> int:
    """The most columns of E R that a tile can accumulate, in addition to the gate's, without a spill.

    For more columns, x or dy is read again for each chunk of them, from the L2 if it is still there. With 128 columns a
    chunk takes about as long for its products as for its reads, on every chip.
    """
    if dtype.itemsize > 2:
        return 128 if experts <= 32 else 32
    if experts > 64:
        return 64 if chip.arch.startswith("sm_10") else 128
    return 128 if uses_mma_sync(chip) else 256


def uses_mma_sync(chip: Chip) -> bool:
    """Whether dots hold their operands in registers, as on NVIDIA's chips without wgmma and tcgen05."""
    return chip.arch.startswith(("sm_8", "sm_12"))


def fit_stages(tile: Tile, most: int, bytes_of_stage: Callable[[Tile], int], chip: Chip) -> Tile:
    """The tile with as many pipeline stages as fit the shared memory, at least two, if need be with fewer features."""
    on_amd = chip.arch.startswith("gfx")  # AMD keeps one of the stages in registers
    while (stages := chip.shared_memory * 9 // 10 // bytes_of_stage(tile) + on_amd) < 2 and tile.F > 16:
        tile = replace(tile, F=tile.F // 2)
    return replace(tile, stages=max(2, min(stages, 2 if on_amd else most)))


def shrink_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory for the pipeline stages of a shrink: rows, factor and gate."""
    return tile.stages * (tile.T + tile.ER + tile.E) * tile.F * dtype.itemsize


def expand_bytes(tile: Tile, dtype: torch.dtype, chip: Chip) -> int:
    """Shared memory for an expand that holds v and dlogits: these, the stages of factor and gate, a tile of the result."""
    on_amd = chip.arch.startswith("gfx")  # which keeps one of the stages, and the result, in registers
    stages, result = (tile.stages - 1, 0) if on_amd else (tile.stages, tile.T)
    return (tile.T * (tile.ER + tile.E) + (stages * (tile.ER + tile.E) + result) * tile.F) * dtype.itemsize


def one_pass_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory for the expand in one pass: v, the pipeline stages of B, and a tile of y."""
    return (tile.T * tile.ER + tile.stages * tile.ER * tile.F + tile.T * tile.F) * dtype.itemsize


def block_of(size: int, least: int = 16, most: int = 1024) -> int:
    """The power of two that covers a size, within bounds."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))
