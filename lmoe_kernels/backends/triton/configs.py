"""Which kernels run, and on which tiles: pure functions of the sizes, the dtype and the chip.

Nothing here was timed: no GPU was at hand. The choices follow registers, spills and shared memory (read from machine code:
`python -m benchmarks.static`), the number of programs against the chip's processors, and bytes counted (`python -m
benchmarks.traffic`). `make gpu` times `SEARCH_SPACE` around them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Sizes:
    """The letters of a call. `E_of_a` is E, or 1 where all experts share one A."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    E_of_a: int
    R: int


@dataclass(frozen=True)
class Chip:
    """What a choice depends on beside the call: "sm_90", "gfx942", ..., or "interpreter"."""

    arch: str
    processors: int
    shared_memory: int  # bytes that one program can have


@dataclass(frozen=True)
class Tile:
    """The block of every letter that a kernel may name, all powers of two, and how it is launched."""

    T: int
    F: int  # features, I or O
    ER: int  # rows of a factor
    E: int = 16
    R: int = 16
    warps: int = 4
    stages: int = 2

    def blocks(self) -> dict[str, int]:
        """The constants of a kernel."""
        return {f"BLOCK_{letter}": getattr(self, letter) for letter in ("T", "F", "ER", "E", "R")}

    def tiles_of(self, tokens: int) -> int:
        """Programs that cover the tokens."""
        return ceil_div(tokens, self.T)


@dataclass(frozen=True)
class ForwardPlan:
    """One pass; or shrink in `splits` parts of I, with the mix where that is one part, then expand."""

    one_pass: Tile | None
    splits: int
    shrink: Tile
    mix: Tile
    expand: Tile


@dataclass(frozen=True)
class BackwardPlan:
    """Shrink of dy in `splits` parts of O, with the mix where that is one part, then expand into dx."""

    splits: int
    shrink: Tile
    mix: Tile
    expand: Tile


@dataclass(frozen=True)
class WgradPlan:
    """A weight gradient, its tokens summed in `splits` parts of `tokens` each."""

    tile: Tile
    splits: int
    tokens: int


@dataclass(frozen=True)
class GroupedPlan:
    """Tokens grouped by expert: the tiles of shrink, expand and wgrad over one expert's tokens, and of the gate alone."""

    shrink: Tile
    expand: Tile
    wgrad: Tile
    gate: Tile
    gate_expand: Tile


REDUCE = Tile(T=16, F=1024, ER=16)  # a copy with a sum: nothing to choose

remembered = lru_cache(maxsize=4096)  # a plan takes some 10 us to make, a launch as long

# What the tuner tries around a choice; blocks of E, ER and R follow from the sizes.
SEARCH_SPACE = {
    "T": (64, 128),
    "F": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}


@remembered
def forward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> ForwardPlan:
    """Which forward kernels run, on which tiles."""
    shrink = shrink_tile(sizes, sizes.E_of_a * sizes.R, dtype, chip)
    # One pass holds the whole E R of both factors in one tile, and its programs are tiles of tokens alone: below three
    # quarters of a wave the two kernels, of which expand has tiles of features too, leave less of the chip idle.
    fits = sizes.E_of_a == sizes.E and sizes.E * sizes.R <= shrink.ER and one_pass_bytes(shrink, dtype) <= chip.shared_memory
    fills = 4 * shrink.tiles_of(sizes.T) >= 3 * chip.processors
    splits = splits_of(shrink, sizes.T, sizes.E_of_a * sizes.R, sizes.I, dtype, chip)
    return ForwardPlan(
        shrink if fits and fills and splits == 1 else None,
        splits,
        shrink,
        mix_tile(sizes, chip),
        expand_tile(sizes, sizes.E * sizes.R, dtype, chip),
    )


@remembered
def backward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> BackwardPlan:
    """Which backward kernels run before the weight gradients, on which tiles."""
    shrink = shrink_tile(sizes, sizes.E * sizes.R, dtype, chip)
    return BackwardPlan(
        splits_of(shrink, sizes.T, sizes.E * sizes.R, sizes.O, dtype, chip),
        shrink,
        mix_tile(sizes, chip),
        expand_tile(sizes, sizes.E_of_a * sizes.R, dtype, chip),
    )


@remembered
def grouped_plan(sizes: Sizes, top_k: int | None, dtype: torch.dtype, chip: Chip) -> GroupedPlan | None:
    """The tiles for tokens grouped by expert, or None where computing all experts costs no more.

    Grouped, x is read once by the gate and once by each slot, y written once and then read and written by each further slot:
    `2 I (1 + k) + 2 O (2 k - 1)` bytes a token against `2 I + 2 O`. That pays only past the region where memory is the
    limit, E R of about 256, and where the tiles, of which each expert's last is half empty, take less than half the work.
    """
    if top_k is None or sizes.E_of_a < sizes.E or sizes.R > 128:
        return None
    shrink = Tile(T=64, F=64, ER=block_of(sizes.R), E=block_of(sizes.E), R=block_of(sizes.R, 1, 64))
    past_memory = 256
    if chip.arch == "interpreter":
        shrink, past_memory = replace(shrink, T=16, F=32), 64
    elif dtype.itemsize > 2:
        shrink = replace(shrink, F=32, warps=8)
    if past_memory >= sizes.E * sizes.R or 2 * top_k * (sizes.T + shrink.T * sizes.E) > sizes.T * sizes.E:
        return None
    shrink = fit_stages(shrink, 4, lambda t: (t.T + t.ER) * t.F * dtype.itemsize, chip)
    return GroupedPlan(
        shrink,
        expand=replace(shrink, F=2 * shrink.F),
        wgrad=fit_stages(replace(shrink, F=2 * shrink.F), 4, lambda t: (t.F + t.ER) * t.T * dtype.itemsize, chip),
        gate=shrink_tile(replace(sizes, E=1, E_of_a=1, R=sizes.E), sizes.E, dtype, chip),
        gate_expand=expand_tile(sizes, sizes.E, dtype, chip),
    )


@remembered
def wgrad_plan(tokens: int, features: int, heights: tuple[int, ...], dtype: torch.dtype, chip: Chip) -> WgradPlan:
    """The tile and the splits of a weight gradient of `heights[0]` rows, and the gate's `heights[1]` beside it."""
    experts = heights[1] if len(heights) == 2 else 1
    tile = Tile(
        T=64, F=128, ER=block_of(heights[0], most=widest(experts, dtype, chip)), E=block_of(experts, most=64), warps=8
    )
    if chip.arch == "interpreter":
        tile = replace(tile, T=32, F=64, ER=min(tile.ER, 64))
    elif dtype.itemsize > 2:  # without tensor cores the operands are in registers too
        tile = replace(tile, T=32, F=64)
    elif tile.ER > 128 and chip.arch.startswith("gfx"):
        tile = replace(tile, F=64)
    stages = 3 if tile.ER == 16 and uses_mma_sync(chip) else 4  # of 16 rows a fourth one spills with Triton 3.6 on sm_80
    tile = fit_stages(tile, stages, lambda t: (t.F + t.ER + t.E) * t.T * dtype.itemsize, chip)
    # As many programs as fill one wave. A split costs 8 ER F bytes, written and read, against T F times the itemsize of
    # the rows themselves: below 512 tokens each it is not worth its bytes.
    programs = ceil_div(features, tile.F) * ceil_div(heights[0], tile.ER)
    least = 32 if chip.arch == "interpreter" else 512
    splits = max(1, min(chip.processors // max(programs, 1), tokens // least))
    if dtype == torch.float32:
        # Its sums run straight on: over 16384 tokens to an error of 19 epsilons, over 2048 to 7 (simulated). Beside the time
        # of their products the bytes of more parts are few. The other dtypes' own roundings are far larger than such errors.
        splits = max(splits, ceil_div(tokens, 2048))
    of_split = max(1, ceil_div(tokens, splits * tile.T)) * tile.T
    return WgradPlan(tile, max(1, ceil_div(tokens, of_split)), of_split)


def shrink_tile(sizes: Sizes, columns: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """The tile of the kernels that sum over features: x against A, dy against B.

    128 tokens halve what is read of A and B out of the L2, `2 columns / 128` bytes for each byte of x in bf16, so they are
    taken as soon as their programs fill the chip. 64 tokens are the least that wgmma takes.
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
    # fp32 has its operands in registers beside the accumulators: with Triton 3.6 more than two stages spill on sm_90
    stages = 2 if dtype.itemsize > 2 else 4
    return fit_stages(tile, stages, lambda t: (t.T + wide) * t.F * dtype.itemsize, chip)


def expand_tile(sizes: Sizes, columns: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """The tile of the kernel that sums over E R, 64 of it at a time."""
    tile = Tile(T=64, F=128, ER=block_of(columns, most=64), E=block_of(sizes.E, most=64), warps=8)  # 4 warps spill on sm_100
    if chip.arch == "interpreter":
        return replace(tile, T=32, F=64)
    if dtype.itemsize > 2:
        tile = replace(tile, F=64, ER=min(tile.ER, 32), E=16)
    elif sizes.T > 64:
        tile = replace(tile, T=128)
    return fit_stages(tile, 3, lambda t: (t.T + t.F) * max(t.ER, t.E) * dtype.itemsize, chip)


def mix_tile(sizes: Sizes, chip: Chip) -> Tile:
    """The tile of the mix on its own: no dots, few tokens, so that a handful of them still makes some programs."""
    return Tile(T=16 if chip.arch == "interpreter" else 4, F=16, ER=64, E=block_of(sizes.E), R=block_of(sizes.R, 1, 64))


def splits_of(tile: Tile, tokens: int, columns: int, features: int, dtype: torch.dtype, chip: Chip) -> int:
    """Parts of the features that a shrink sums apart: 1 where its tiles of tokens fill half the chip.

    Parts are written and read in fp32, `8 columns` bytes a token each, and want a launch of their own: half the chip can
    draw most of the memory's bandwidth, so that more is not bought at that price. A part is four steps of the loop at least,
    and their number a power of two: the mix, which unrolls its loop over them, is compiled for each number that a run meets.
    Two parts are taken of more than 128 experts, whose gates spill beside the mix of 64 tokens: that gives the mix a kernel
    and a tile of its own. In fp32 a part is of 1024 features at most, whose sum has an error of 5 epsilons.
    """
    tiles = tile.tiles_of(tokens)
    splits = 1 if tile.E <= 128 else 2
    if 2 * tiles < chip.processors and tile.E <= 128:
        programs = tiles * ceil_div(columns, tile.ER)
        most = max(1, min(chip.processors // max(programs, 1), features // (4 * tile.F)))
        splits = 1 << (most.bit_length() - 1)
    if dtype == torch.float32:
        splits = max(splits, block_of(ceil_div(features, 1024), least=1))
    of_split = ceil_div(features, splits * tile.F) * tile.F  # whole steps: what is left over takes no part of its own
    return max(1, ceil_div(features, max(of_split, 1)))


def widest(experts: int, dtype: torch.dtype, chip: Chip) -> int:
    """Columns of E R that a tile's accumulators hold beside the gate's without a spill.

    With more, x or dy is read again for each such chunk, out of the L2 if it is still there: at 128 columns a chunk is about
    as long at its sums as at its reading, on every chip.
    """
    if dtype.itemsize > 2:
        return 128 if experts <= 32 else 32
    if experts > 64:
        return 64 if chip.arch.startswith("sm_10") else 128
    return 128 if uses_mma_sync(chip) else 256


def uses_mma_sync(chip: Chip) -> bool:
    """Whether dots hold their operands in registers: on NVIDIA's chips without wgmma and tcgen05."""
    return chip.arch.startswith(("sm_8", "sm_12"))


def fit_stages(tile: Tile, most: int, bytes_of_stage: Callable[[Tile], int], chip: Chip) -> Tile:
    """The tile with as many stages of its loop as fit the shared memory, two at least: over fewer features if need be."""
    on_amd = chip.arch.startswith("gfx")  # of its two stages one is in registers
    while (stages := chip.shared_memory * 9 // 10 // bytes_of_stage(tile) + on_amd) < 2 and tile.F > 16:
        tile = replace(tile, F=tile.F // 2)
    return replace(tile, stages=max(2, min(stages, 2 if on_amd else most)))


def one_pass_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory of the second half of one pass: v, the stages of B, and a tile of y on its way out."""
    return (tile.T * tile.ER + tile.stages * tile.ER * tile.F + tile.T * tile.F) * dtype.itemsize


def ceil_div(size: int, block: int) -> int:
    """Blocks that cover a size."""
    return -(-size // block)


def block_of(size: int, least: int = 16, most: int = 1024) -> int:
    """The power of two that covers a size, within bounds."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))
