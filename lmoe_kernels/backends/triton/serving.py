# SPDX-License-Identifier: Apache-2.0
"""Serving on Triton: one shrink for the A and the gates of all blocks; a mix and an expand for the blocks of one kind.

The modules of a usual layer have one kind, so that a call is three launches, with any number of adapters.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.mix import Constants, gate_constants
from lmoe_kernels.backends.triton.stacked import Table, stacked_expand_fwd, stacked_mix_fwd, stacked_shrink_fwd
from lmoe_kernels.backends.triton.stacked_configs import stacked_plan
from lmoe_kernels.options import Block, Place, Sizes, StackedFactors, TokenGroups, places_of

_Placed = list[tuple[Block, Place]]


class _Stack(NamedTuple):
    """What calls with the same blocks have in common. Each launch of mix and expand has a table, constants and sizes."""

    row_groups: Tensor  # (rows of A and of the gates) int64, the group of each row's block
    groups: int
    tables: tuple[Table, ...]
    constants: tuple[Constants, ...]
    sizes: tuple[Sizes, ...]  # without tokens and in_features; O is that of all blocks of one group


def add_stacked(
    y: Tensor,  # (T, N), changed in place
    x: Tensor,  # (T, I)
    factors: StackedFactors,
    blocks: tuple[Block, ...],
    groups: TokenGroups | None,
) -> None:
    """Add the delta of every block to its columns of y; see `lmoe_kernels.reference.add_stacked` for the contract."""
    gate, logits, (tokens, features) = factors.gate_weight, factors.gate_logits, x.shape
    factors = factors._replace(
        gate_weight=None if gate is None else gate.to(x.dtype),  # it is wider on a CPU alone
        gate_logits=None if logits is None else logits.contiguous(),
    )
    if groups is not None and groups.scale is not None:
        groups = groups._replace(scale=groups.scale.contiguous())
    stack = _stack_of(blocks, groups is not None, x.device, host.accumulator(x))
    rows_of_gate = 0 if gate is None else gate.shape[0]
    # As if each tile of tokens had one group: more programs than a chip runs at once cost less than idle processors.
    rows = -(-(factors.lora_a.shape[0] + rows_of_gate) // stack.groups)
    # With groups, a program leaves out tokens of other groups, whose gates are in the same tile.
    gates = rows_of_gate if groups is None else 0
    plan = stacked_plan(tokens, features, rows, gates, stack.sizes, x.dtype, host.chip_of(x.device))
    with host.on_device_of(x):
        parts = stacked_shrink_fwd(
            x, factors, groups, stack.row_groups, plan.splits, plan.shrink, gate_with_a=plan.gate_with_a
        )
        for table, constants, sizes, tiles in zip(stack.tables, stack.constants, stack.sizes, plan.tiles, strict=True):
            v = x.new_empty(len(table.places), tokens, sizes.E, sizes.R)
            stacked_mix_fwd(parts, factors, groups, table, v, constants, tiles.mix)
            stacked_expand_fwd(v, factors.lora_b, groups, table, y, tiles.expand, tiles.steps)


@lru_cache(4096)
def _stack_of(blocks: tuple[Block, ...], in_groups: bool, device: torch.device, acc: torch.dtype) -> _Stack:
    """The tables of the blocks, on the device.

    They are made at the first call, since a CUDA graph can neither wait for a copy from the host nor keep a tensor for calls
    outside of it.

    Raises:
        RuntimeError: the first call is captured by a CUDA graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        must = "have been called once before a CUDA graph captures a call"
        raise RuntimeError(f"lmoe_stacked_: experts must {must}, got a first call")
    placed = list(zip(blocks, places_of(blocks), strict=True))
    row_groups = [block.group for block in blocks for _ in range(block.rows_of_a)]
    row_groups += [block.group for block in blocks for _ in range(block.num_experts)]
    groups = len({block.group for block in blocks}) if in_groups else 1
    tables, constants, sizes = [], [], []
    for same in _launches(placed, in_groups):
        block, columns = same[0][0], sum(one.out_features for one, _ in same)
        of_launch = Sizes(0, 0, -(-columns // groups), block.num_experts, block.rank, block.rows_of_a // block.rank)
        tables.append(_table_of(same, device, acc))
        constants.append(gate_constants(of_launch, block.options))
        sizes.append(of_launch)
    of_rows = torch.tensor(row_groups, dtype=torch.int64, device=device)
    return _Stack(of_rows, groups, tuple(tables), tuple(constants), tuple(sizes))


def _launches(placed: _Placed, in_groups: bool) -> Iterator[_Placed]:
    """The blocks that one launch takes: those of one kind, no two of which add to the same element of y.

    Two blocks with columns in common may be in one launch if they add to different tokens.
    """
    by_kind: dict[tuple[object, ...], list[_Placed]] = {}
    for block, place in placed:
        launches = by_kind.setdefault(block.kind, [])
        for launch in launches:
            if not any(_overlap(block, one, in_groups) for one, _ in launch):
                launch.append((block, place))
                break
        else:
            launches.append([(block, place)])
    for launches in by_kind.values():
        yield from launches


def _overlap(one: Block, other: Block, in_groups: bool) -> bool:
    """Whether two blocks add to the same elements of y."""
    if in_groups and one.group != other.group:
        return False
    return one.column < other.column + other.out_features and other.column < one.column + one.out_features


def _table_of(placed: _Placed, device: torch.device, acc: torch.dtype) -> Table:
    numbers, scalings, alignment = [], [], 16
    for block, (a, experts, b, columns) in placed:
        numbers.append([block.group, a.start, experts.start, b.start, block.column, block.out_features])
        scalings.append(block.scaling)
        alignment = gcd(alignment, b.start, columns.start, block.out_features)
    return Table(
        torch.tensor(numbers, dtype=torch.int64, device=device),
        torch.tensor(scalings, dtype=acc, device=device),
        alignment,
        max(block.out_features for block, _ in placed),
    )
