# SPDX-License-Identifier: Apache-2.0
"""Which kernels run, and on which tiles: pure functions of the sizes, the dtype and the chip.

Nothing here was timed on a GPU yet. The choices follow registers, spills and shared memory (read from the machine code by
`python -m benchmarks.inspect.static`), the number of programs against that of the chip's processors, and counted bytes
(`python -m benchmarks.inspect.traffic`). `make gpu` times the tiles of `SEARCH_SPACE` around each choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from lmoe_kernels.options import Options, Sizes


@dataclass(frozen=True)
class Chip:
    """What a choice depends on in addition to the call."""

    arch: str  # "sm_90", "gfx942", ..., or "interpreter"
    processors: int
    shared_memory: int  # bytes that one program can use


@dataclass(frozen=True)
class Tile:
    """The blocks that a kernel may have as parameters, all powers of two, and how it is launched."""

    T: int
    F: int  # features, I or O
    ER: int  # rows of a factor
    E: int = 16
    R: int = 16
    warps: int = 4
    stages: int = 2

    def blocks(self) -> dict[str, int]:
        """The blocks under the names of the kernels' parameters."""
        return {f"BLOCK_{letter}": getattr(self, letter) for letter in ("T", "F", "ER", "E", "R")}

    def tiles_of(self, tokens: int) -> int:
        """Programs that cover the tokens."""
        return ceil_div(tokens, self.T)


@dataclass(frozen=True)
class ForwardPlan:
    """One pass; or shrink, mix and expand. Shrink and mix are one kernel where I is not split."""

    one_pass: Tile | None
    splits: int  # of I
    shrink: Tile
    mix: Tile
    expand: Tile


@dataclass(frozen=True)
class BackwardPlan:
    """Shrink of dy, the mix's backward, and expand into dx. The first two are one kernel where O is not split."""

    splits: int  # of O
    shrink: Tile
    mix: Tile
    expand: Tile


@dataclass(frozen=True)
class WgradPlan:
    """A weight gradient, as partial sums over splits of the tokens."""

    tile: Tile
    splits: int
    tokens: int  # of a split


@dataclass(frozen=True)
class GroupedPlan:
    """The tiles where tokens are grouped by expert; the gate has its own, since it needs all experts."""

    shrink: Tile
    expand: Tile
    wgrad: Tile
    gate: Tile
    gate_expand: Tile


REDUCE_TILE = Tile(T=16, F=1024, ER=16)  # of the kernel that adds up partial sums, whose speed depends on memory alone

cached_plan = lru_cache(maxsize=4096)  # making a plan takes about as long as a launch, some 10 us

# The tiles that `make gpu` times around a choice; blocks of E, ER and R follow from the sizes.
SEARCH_SPACE = {
    "T": (64, 128),
    "F": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}


@cached_plan
def forward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> ForwardPlan:
    """Which forward kernels run, on which tiles."""
    shrink = shrink_tile(sizes, sizes.experts_of_a * sizes.R, dtype, chip)
    # One pass holds all E R rows of both factors in one tile, and has one program for each tile of tokens. Below three
    # quarters of a wave of programs, two kernels leave less of the chip idle, because expand has tiles of features too.
    one_tile = sizes.experts_of_a == sizes.E and sizes.E * sizes.R <= shrink.ER
    fits = one_tile and one_pass_bytes(shrink, dtype) <= chip.shared_memory
    fills = 4 * shrink.tiles_of(sizes.T) >= 3 * chip.processors
    splits = splits_of(shrink, sizes.T, sizes.experts_of_a * sizes.R, sizes.I, dtype, chip)
    return ForwardPlan(
        shrink if fits and fills and splits == 1 else None,
        splits,
        shrink,
        mix_tile(sizes, chip),
        expand_tile(sizes, sizes.E * sizes.R, dtype, chip),
    )


@cached_plan
def backward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> BackwardPlan:
    """Which backward kernels run before the weight gradients, on which tiles."""
    shrink = shrink_tile(sizes, sizes.E * sizes.R, dtype, chip)
    return BackwardPlan(
        splits_of(shrink, sizes.T, sizes.E * sizes.R, sizes.O, dtype, chip),
        shrink,
        mix_tile(sizes, chip),
        expand_tile(sizes, sizes.experts_of_a * sizes.R, dtype, chip),
    )


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
    if chip.arch == "interpreter":
        shrink = replace(shrink, T=16, F=32)
    elif dtype.itemsize > 2:
        shrink = replace(shrink, F=32, warps=8)
    if 2 * options.kept(sizes.E) * (sizes.T + shrink.T * sizes.E) > sizes.T * sizes.E:
        return None
    shrink = fit_stages(shrink, 4, lambda t: (t.T + t.ER) * t.F * dtype.itemsize, chip)
    return GroupedPlan(
        shrink,
        expand=replace(shrink, F=2 * shrink.F),
        wgrad=fit_stages(replace(shrink, F=2 * shrink.F), 4, lambda t: (t.F + t.ER) * t.T * dtype.itemsize, chip),
        gate=shrink_tile(sizes._replace(E=1, R=sizes.E, experts_of_a=1), sizes.E, dtype, chip),
        gate_expand=expand_tile(sizes, sizes.E, dtype, chip),
    )


@cached_plan
def wgrad_plan(tokens: int, features: int, heights: tuple[int, ...], dtype: torch.dtype, chip: Chip) -> WgradPlan:
    """The tile and the splits of a weight gradient of `heights[0]` rows, and of the gate's of `heights[1]` where given."""
    experts = heights[1] if len(heights) == 2 else 1
    tile = Tile(
        T=64, F=128, ER=block_of(heights[0], most=widest(experts, dtype, chip)), E=block_of(experts, most=64), warps=8
    )
    if chip.arch == "interpreter":
        tile = replace(tile, T=32, F=64, ER=min(tile.ER, 64))
    elif dtype.itemsize > 2:  # without tensor cores the operands take registers too
        tile = replace(tile, T=32, F=64)
    elif tile.ER > 128 and chip.arch.startswith("gfx"):
        tile = replace(tile, F=64)
    stages = 3 if tile.ER == 16 and uses_mma_sync(chip) else 4  # with 16 rows a fourth spills (Triton 3.6 for sm_80)
    tile = fit_stages(tile, stages, lambda t: (t.F + t.ER + t.E) * t.T * dtype.itemsize, chip)
    # As many programs as fill one wave. Each split writes and reads 8 ER F bytes of partial sums, against T F times the
    # itemsize for the rows themselves: with fewer than 512 tokens to a split that costs more than it saves.
    programs = ceil_div(features, tile.F) * ceil_div(heights[0], tile.ER)
    least = 32 if chip.arch == "interpreter" else 512
    splits = max(1, min(chip.processors // max(programs, 1), tokens // least))
    if dtype == torch.float32:
        # A running sum of 16384 tokens has an error of 19 epsilons, one of 2048 tokens 7 (simulated). The bytes of further
        # partial sums take little time next to the products. In half precision other rounding errors are far larger.
        splits = max(splits, ceil_div(tokens, 2048))
    of_split = max(1, ceil_div(tokens, splits * tile.T)) * tile.T
    return WgradPlan(tile, max(1, ceil_div(tokens, of_split)), of_split)


def shrink_tile(sizes: Sizes, columns: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """The tile of the kernels that sum over features: x with A, dy with B.

    Tiles of 128 tokens halve the reads of A and B from the L2, which are `2 columns / 128` bytes for each byte of x in bf16,
    so they are used as soon as their programs fill the chip. wgmma needs at least 64 tokens.
    """
    tile = Tile(
        T=64, F=64, ER=block_of(columns, most=widest(sizes.E, dtype, chip)), E=block_of(sizes.E), R=block_of(sizes.R, 1, 64)
    )
    if chip.arch == "interpreter":
        return replace(tile, T=32, F=32, ER=min(tile.ER, 64))
    wide = tile.ER + tile.E
    if dtype.itemsize > 2:
        tile = replace(tile, T=64 if tile.E <= 32 else 32, F=32, warps=8)
    elif 3 * chip.processors <= 4 * ceil_div(sizes.T, 128) and tile.E <= 64:
        tile = replace(tile, T=128, warps=8)
    elif wide > 160 or uses_mma_sync(chip):
        tile = replace(tile, warps=8)
    # fp32 keeps its operands in registers, like the accumulators: more than two stages spill (Triton 3.6 for sm_90)
    stages = 2 if dtype.itemsize > 2 else 4
    return fit_stages(tile, stages, lambda t: (t.T + wide) * t.F * dtype.itemsize, chip)


def expand_tile(sizes: Sizes, columns: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """The tile of the kernel that sums over E R, in steps of at most 64."""
    tile = Tile(T=64, F=128, ER=block_of(columns, most=64), E=block_of(sizes.E, most=64), warps=8)  # 4 warps spill on sm_100
    if chip.arch == "interpreter":
        return replace(tile, T=32, F=64)
    if dtype.itemsize > 2:
        tile = replace(tile, F=64, ER=min(tile.ER, 32), E=16)
    elif sizes.T > 64:
        tile = replace(tile, T=128)
    return fit_stages(tile, 3, lambda t: (t.T + t.F) * max(t.ER, t.E) * dtype.itemsize, chip)


def mix_tile(sizes: Sizes, chip: Chip) -> Tile:
    """The tile of the mix as a kernel of its own: no dots, and few tokens, so that small batches make more programs."""
    return Tile(T=16 if chip.arch == "interpreter" else 4, F=16, ER=64, E=block_of(sizes.E), R=block_of(sizes.R, 1, 64))


def splits_of(tile: Tile, tokens: int, columns: int, features: int, dtype: torch.dtype, chip: Chip) -> int:
    """The split-K factor of a shrink: 1 where its tiles of tokens fill half the chip.

    Partial sums are written and read in fp32, `8 columns` bytes a token for each split, and need a further launch. Half the
    processors already saturate most of the bandwidth, so further splitting is not worth its cost. A split has at least four
    steps of the loop. The number of splits is a power of two, because the mix unrolls its loop over them and is compiled
    again for each number. More than 128 experts are split in two, which gives the mix a kernel with a tile of its own: in
    one kernel with the shrink, on 64 tokens, their gates spill. In fp32 a split has at most 1024 features, whose sum has an
    error of 5 epsilons.
    """
    tiles = tile.tiles_of(tokens)
    splits = 1 if tile.E <= 128 else 2
    if 2 * tiles < chip.processors and tile.E <= 128:
        programs = tiles * ceil_div(columns, tile.ER)
        most = max(1, min(chip.processors // max(programs, 1), features // (4 * tile.F)))
        splits = 1 << (most.bit_length() - 1)
    if dtype == torch.float32:
        splits = max(splits, block_of(ceil_div(features, 1024), least=1))
    of_split = ceil_div(features, splits * tile.F) * tile.F  # whole steps, which may need fewer splits
    return max(1, ceil_div(features, max(of_split, 1)))


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


def one_pass_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory for the expand in one pass: v, the pipeline stages of B, and a tile of y."""
    return (tile.T * tile.ER + tile.stages * tile.ER * tile.F + tile.T * tile.F) * dtype.itemsize


def ceil_div(size: int, block: int) -> int:
    """Blocks that cover a size."""
    return -(-size // block)


def block_of(size: int, least: int = 16, most: int = 1024) -> int:
    """The power of two that covers a size, within bounds."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))
