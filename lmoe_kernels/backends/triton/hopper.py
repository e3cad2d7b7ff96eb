# SPDX-License-Identifier: Apache-2.0
"""The choices for Hopper's chips in half precision, which follow times and not the model of `cost.py`.

Plans were timed on one H200 (torch 2.11, Triton 3.6, 2026-11-26) with 16 to 16384 tokens, 2048 to 14336 features and up to
1024 columns of E R. All times are in benchmarks/results/nvidia-h200/plans.jsonl; `tests/triton/test_timed_plans.py` compares
each choice with the fastest.
"""

from dataclasses import replace

import torch

from lmoe_kernels.backends.triton.cost import ceil_div
from lmoe_kernels.backends.triton.plans import Chip, Tile, WgradPlan


def covers(dtype: torch.dtype, chip: Chip) -> bool:
    """Whether the choices here are meant for a dtype on a chip.

    There no forward takes one pass: the stages took 25.3 us where one pass took 59.7 (2048 tokens), 60.0 where it took 64.5
    (8192), and 104.4 where it took 104.2 (16384).
    """
    return chip.arch == "sm_90" and dtype.itemsize == 2


def is_narrow(tile: Tile) -> bool:
    """Whether one tile has all columns of up to 16 experts, at most 128."""
    return tile.ER <= 128 and tile.E == 16


def shrink_tiles(tile: Tile, tokens: int, chip: Chip) -> list[Tile]:
    """The tiles for a shrink of up to 64 experts, given one of 64 tokens by 64 features.

    Where a narrow tile has a processor for each program, steps of 128 features are faster than those of 64 (60.0 and 67.8 us
    at 8192 tokens). Few tokens are faster in steps of 64, which allow up to 16 splits: with 512 tokens, and inputs that take
    turns, 16 splits in steps of 64 took 13.6 us, and 8 splits in steps of 128 took 14.8. Where there are more tiles than
    processors, two programs with steps of 64 share a processor.
    """
    if is_narrow(tile):
        in_wide_steps = chip.processors < 16 * tile.tiles_of(tokens) <= 16 * chip.processors
        return [replace(tile, F=128 if in_wide_steps else 64, stages=4)]
    tile = replace(tile, warps=8 if tile.ER + tile.E > 160 else 4, stages=4)
    return [tile, replace(tile, T=128, warps=8, stages=3)] if tokens > 64 else [tile]


def shrinks(ways: list[tuple[Tile, int]], tokens: int, columns: int, chip: Chip) -> list[tuple[Tile, int]]:
    """Of tiles with their splits those to choose from: one, or all where no tile fills the chip.

    The fastest had as many splits as leave a processor for each program, and 64 tokens rather than 128 where both fill the
    chip (E=16, R=64: 281 and 304 us at 8192 tokens). A wide tile was faster with 4 warps in splits (E=8, R=64: 31.5 and 33.9
    us at 1024 tokens), and with 8 in one kernel with the mix (E=64, R=16: 315 and 328 us at 8192 tokens).
    """
    most: dict[Tile, tuple[int, int]] = {}  # of each tile, the splits and the programs
    for tile, splits in ways:
        programs = tile.tiles_of(tokens) * splits * (ceil_div(columns, tile.ER) if splits > 1 else 1)
        if tile not in most or programs <= chip.processors:
            most[tile] = splits, programs
    for tile, (splits, programs) in most.items():
        if is_narrow(tile):
            return [(tile, splits)]
        if tile.E <= 64 and 5 * chip.processors <= 6 * programs <= 6 * chip.processors:
            return [(replace(tile, warps=4) if splits > 1 and tile.T == 64 else tile, splits)]
    return ways


def wgrad_plan(tokens: int, features: int, rows: int, tile: Tile, chip: Chip) -> WgradPlan:
    """The plan of a weight gradient of so many rows, which a narrow tile of 128 features holds.

    In tiles of 64 features two programs share a processor, so that one loads while the other one multiplies. Tiles of 128
    load fewer bytes, which wins where a split has many tokens (16384 tokens with the gate: 52.6 and 56.4 us). Tiles of 256
    lost: 40.2 us where those of 64 took 32.1, at 8192 tokens. Splits of less than 1024 tokens did not pay.
    """
    for tile_features, at_once in ((64, 2), (128, 1)):
        tile = replace(tile, F=tile_features, stages=4)
        programs = ceil_div(features, tile.F) * ceil_div(rows, tile.ER)
        splits = largest_power(min(at_once * chip.processors // max(programs, 1), tokens // 1024))
        of_split = max(1, ceil_div(tokens, splits * tile.T)) * tile.T
        if of_split <= 2048:
            break
    return WgradPlan(tile, max(1, ceil_div(tokens, of_split)), of_split)


def largest_power(most: int) -> int:
    """The largest power of two up to a number, at least one."""
    return 1 << max(most, 1).bit_length() - 1
