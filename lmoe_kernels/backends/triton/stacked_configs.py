# SPDX-License-Identifier: Apache-2.0
"""The tiles of the kernels for several mixtures that read the same x, from those of `configs.py`.

Where programs of A compute the product with the gates too, the shrink has the tiles of a forward, which were timed as those
of a forward. No chip timed the other tiles.
"""

from dataclasses import replace

import torch

from lmoe_kernels.backends.triton import configs, cost, hopper
from lmoe_kernels.backends.triton.plans import Chip, StackedPlan, StackedTiles, Tile
from lmoe_kernels.options import Sizes

_FEW_TOKENS = 64
_MOST_GATES = 32  # that programs of A compute too: tiles for more have fewer rows of A, or the model finds them slower
_WIDTHS = (64, 128, 256)  # rows of a factor, as far as a tile of the chip can accumulate them


@configs.cached_plan
def stacked_plan(
    tokens: int, features: int, rows: int, gates: int, kinds: tuple[Sizes, ...], dtype: torch.dtype, chip: Chip
) -> StackedPlan:
    """The tiles for so many rows of A and of the gates in all.

    `gates` of the rows are gates that programs of A may compute too, or there are none of these. For many tokens they do:
    programs of their own read x once more, and one module of 14336 features took 69.7 us so, where a forward and a copy took
    49.8 (2048 tokens, E=8, R=16, bf16, an H200, 2026-11-26). Otherwise the gates are further rows of the factor. `kinds` are
    the blocks that share a launch of the mix and of expand, with the sum of their features.
    """
    aligned = features % 16 == 0  # else x comes through registers, where tiles with a gate spill (sm_90)
    gate_with_a = aligned and tokens > _FEW_TOKENS and 0 < gates <= _MOST_GATES
    if gate_with_a:
        columns = rows - gates
        ways = configs.shrinks(Sizes(tokens, features, 0, gates, columns, 1), features, columns, dtype, chip)
    else:
        columns, gates = rows, 0
        ways = _shrinks(tokens, features, rows, dtype, chip)
    mix = stacked_mix_tile(kinds[0], chip)

    def seconds(way: tuple[Tile, int]) -> float:
        tile, splits = way
        shrink = cost.shrink(tokens, features, columns, gates, tile.T, tile.ER, splits, dtype.itemsize)
        shrink = shrink._replace(slots=configs.slots_of(configs.shrink_bytes(tile, dtype), chip))
        of_mix = cost.mix_fwd(tokens, rows, rows, 0, mix.T, splits, dtype.itemsize)._replace(slots=configs.SLOTS_OF_MIX)
        return configs.seconds_of({"_stacked_shrink_fwd_kernel": shrink, "_stacked_mix_fwd_kernel": of_mix}, chip)

    shrink, splits = min(ways, key=seconds)
    tiles = []
    for kind in kinds:
        expand = configs.expand_tile(kind._replace(T=tokens, E=1), kind.E * kind.R, kind.O, dtype, chip)
        tiles.append(StackedTiles(stacked_mix_tile(kind, chip), expand, expand.chunks(kind.O)[1]))
    return StackedPlan(splits, shrink, gate_with_a, tuple(tiles))


def _shrinks(tokens: int, features: int, rows: int, dtype: torch.dtype, chip: Chip) -> list[tuple[Tile, int]]:
    """The tiles of several widths with their splits. Many rows in narrow tiles fill a chip where tokens do not."""
    one = Sizes(tokens, features, 0, 1, rows, 1)
    tiles = dict.fromkeys(tile for width in _WIDTHS for tile in configs.shrink_tiles(one, min(width, rows), dtype, chip))
    found = []
    for tile in tiles:
        if features % 8:  # rows that are not aligned come through registers, where steps of 128 features spill (sm_90)
            tile = replace(tile, F=min(tile.F, 64))
        ways = [(tile, splits) for splits in configs.splits_of(tile, features, dtype)]
        found += hopper.shrinks(ways, tokens, rows, chip) if hopper.covers(dtype, chip) else ways
    return found


def stacked_mix_tile(sizes: Sizes, chip: Chip) -> Tile:
    """The tile of a mix with a dimension for the experts: 4096 elements at most, 32 of each thread."""
    tokens, experts = 16 if chip.arch == "interpreter" else 4, configs.block_of(sizes.E, least=1)
    return Tile(T=tokens, F=16, ER=16, E=experts, R=configs.block_of(sizes.R, 1, max(1, 4096 // (tokens * experts))))
