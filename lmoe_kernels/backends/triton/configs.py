"""Which kernels run, and on which tiles: pure functions of the sizes, the dtype and the chip.

Nothing here was timed: no GPU was at hand. The choices follow registers and shared memory (read from machine code: `python -m
benchmarks.static`), the number of programs against the chip's processors, and bytes (`python -m benchmarks.traffic`).
"""

from dataclasses import dataclass, replace

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
    """What a choice depends on: "sm_90", "gfx942", ..., or "interpreter"."""

    arch: str
    processors: int
    shared_memory: int  # bytes that one program can have


@dataclass(frozen=True)
class Tile:
    """The block of every letter that a kernel may name, all powers of two, and how it is launched."""

    T: int = 64
    F: int = 64  # features, I or O
    ER: int = 16  # rows of a factor
    E: int = 16
    R: int = 16
    warps: int = 4
    stages: int = 3

    def blocks(self) -> dict[str, int]:
        """The constants of a kernel."""
        return {f"BLOCK_{letter}": getattr(self, letter) for letter in ("T", "F", "ER", "E", "R")}

    def tiles_of(self, tokens: int) -> int:
        """Programs that cover the tokens."""
        return -(-tokens // self.T)


REDUCE = Tile(F=1024)  # _reduce_bwd_kernel is a copy: nothing to choose


@dataclass(frozen=True)
class ForwardPlan:
    """One pass, or shrink in `splits` parts of I, then mix, then expand."""

    one_pass: Tile | None
    splits: int
    shrink: Tile
    mix: Tile
    expand: Tile


@dataclass(frozen=True)
class BackwardPlan:
    """Shrink of dy in `splits` parts of O with the mix, expand into dx, and the weight gradients."""

    splits: int
    shrink: Tile
    mix: Tile
    expand: Tile


@dataclass(frozen=True)
class WgradPlan:
    """One weight gradient, its tokens summed in `splits` parts of `tokens` each."""

    tile: Tile
    splits: int
    tokens: int


def forward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> ForwardPlan:
    """Which forward kernels run, on which tiles."""
    widest = max(sizes.E, sizes.E_of_a) * sizes.R
    shrink = Tile(T=16, F=16, ER=block_of(sizes.E_of_a*sizes.R, most=32), E=block_of(sizes.E), R=block_of(sizes.R, 1, 16))
    expand = replace(shrink, F=32, ER=block_of(sizes.E*sizes.R, most=32))
    fits = sizes.E * sizes.R <= 32
    one = replace(shrink, ER=block_of(sizes.E*sizes.R, most=32), T=32) if fits and sizes.T > 16 else None
    return ForwardPlan(one, 1 if sizes.T % 2 else 2, shrink, replace(shrink, T=4), expand)


def backward_plan(sizes: Sizes, dtype: torch.dtype, chip: Chip) -> BackwardPlan:
    shrink = Tile(T=16, F=16, ER=block_of(sizes.E*sizes.R, most=32), E=block_of(sizes.E), R=block_of(sizes.R, 1, 16))
    expand = replace(shrink, F=32, ER=block_of(sizes.E_of_a*sizes.R, most=32))
    return BackwardPlan(1 if sizes.T % 2 else 2, shrink, replace(shrink, T=4), expand)


def wgrad_plan(tokens: int, features: int, heights: list[int], dtype: torch.dtype, chip: Chip) -> WgradPlan:
    tile = Tile(T=16, F=32, ER=block_of(heights[0], most=32), E=block_of(heights[-1]))
    splits = 2 if tokens > 16 else 1
    per = -(-tokens // splits)
    per = -(-per // 16) * 16
    return WgradPlan(tile, splits, per)


def block_of(size: int, least: int = 16, most: int = 1024) -> int:
    """The power of two that covers a size."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))
