# SPDX-License-Identifier: Apache-2.0
"""What `configs.py` chooses: the tile of a kernel, and the plan of a forward, a backward or a weight gradient."""

from dataclasses import astuple, dataclass
from functools import cached_property
from typing import NamedTuple

from lmoe_kernels.backends.triton.cost import ceil_div


class Chip(NamedTuple):
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
    chunk: int = 0  # features that a program of expand walks over, block by block; at least one block

    key = cached_property(astuple)  # the fields, which are hashed and compared faster in a tuple

    def blocks(self) -> dict[str, int]:
        """The blocks under the names of the kernels' parameters."""
        return {f"BLOCK_{letter}": getattr(self, letter) for letter in ("T", "F", "ER", "E", "R")}

    def tiles_of(self, tokens: int) -> int:
        """Programs that cover the tokens."""
        return ceil_div(tokens, self.T)

    def chunks(self, features: int) -> tuple[int, int]:
        """In how many chunks of about the same length expand walks over the features, and in how many blocks over each."""
        blocks = ceil_div(features, self.F)
        chunks = ceil_div(blocks, self.chunk // self.F or 1) or 1
        steps = ceil_div(blocks, chunks) or 1
        return ceil_div(blocks, steps), steps


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

    route: Tile
    shrink: Tile
    expand: Tile
    wgrad: Tile
    gate: Tile
    gate_expand: Tile


@dataclass(frozen=True)
class StackedTiles:
    """The tiles of one launch of the mix and one of expand, which take several blocks of one kind."""

    mix: Tile
    expand: Tile
    steps: int  # blocks of features that a program of expand walks over


@dataclass(frozen=True)
class StackedPlan:
    """Several mixtures that read the same x: one shrink for all of them, in splits, then mix and expand for each kind."""

    splits: int  # of I; the partial sums are in memory also where there is one
    shrink: Tile
    gate_with_a: bool  # whether the programs of A compute the product with the gates too
    tiles: tuple[StackedTiles, ...]
