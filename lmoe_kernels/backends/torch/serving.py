# SPDX-License-Identifier: Apache-2.0
"""Serving on ATen: all blocks share one product with x for u and one for the logits; each product with B adds to y in place.

Neighbouring blocks of one kind are mixed together, as if they were more tokens.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

import torch.nn.functional as F
from torch import Tensor

from lmoe_kernels.backends.torch.forward import gate_softmax, mix, of_kept, row_and_column
from lmoe_kernels.options import Block, Place, StackedFactors, TokenGroups, places_of
from lmoe_kernels.products import linear_wide

_Blocks = tuple[tuple[Block, Place], ...]


def add_stacked(
    y: Tensor,  # (T, N), changed in place
    x: Tensor,  # (T, I)
    factors: StackedFactors,
    blocks: tuple[Block, ...],
    groups: TokenGroups | None,
) -> None:
    """Add the delta of every block to its columns of y; see `lmoe_kernels.reference.add_stacked` for the contract."""
    for group, placed in _by_group(blocks):
        if groups is None:
            _add_group(y, x, factors, placed, None, None)
        elif x.is_cuda:  # to select tokens would wait for the GPU, and no CUDA graph could hold it
            _add_group(y, x, factors, placed, groups.scale, groups.group != group)
        else:
            _add_to_some(y, x, factors, placed, groups, groups.group == group)


@lru_cache(4096)
def _by_group(blocks: tuple[Block, ...]) -> list[tuple[int, _Blocks]]:
    """The neighbouring blocks of one group, with their places."""
    placed = zip(blocks, places_of(blocks), strict=True)
    return [(group, tuple(of_group)) for group, of_group in groupby(placed, lambda pair: pair[0].group)]


def _add_to_some(
    y: Tensor, x: Tensor, factors: StackedFactors, placed: _Blocks, groups: TokenGroups, chosen: Tensor
) -> None:
    """Add the blocks of a group to the tokens that are chosen: the other tokens cost nothing."""
    tokens = chosen.nonzero().squeeze(1)
    if len(tokens) == len(x):
        _add_group(y, x, factors, placed, groups.scale, None)
    elif len(tokens) > 0:
        logits, some = factors.gate_logits, y[tokens]
        if logits is not None:
            factors = factors._replace(gate_logits=logits[tokens])
        scale = None if groups.scale is None else groups.scale[tokens]
        _add_group(some, x[tokens], factors, placed, scale, None)
        y[tokens] = some


def _add_group(
    y: Tensor,  # (T, N), changed in place
    x: Tensor,  # (T, I)
    factors: StackedFactors,
    placed: _Blocks,
    scale: Tensor | None,  # (T)
    off: Tensor | None,  # (T) bool, the tokens that get nothing
) -> None:
    (_, first), (_, last) = placed[0], placed[-1]
    lora_a, lora_b, gate_weight, gate_bias, logits = factors
    u = F.linear(x, lora_a[first.a.start : last.a.stop])  # [T, I] @ [I, sum E R] -> [T, sum E R]
    experts = slice(first.experts.start, last.experts.stop)
    if gate_weight is not None:
        logits = linear_wide(x, gate_weight[experts])  # [T, I] @ [I, sum E] -> [T, sum E]
    else:
        assert logits is not None
        logits = logits[:, experts]
    if gate_bias is not None:
        logits = logits + gate_bias[experts]
    for block, place, v in _mixed(u, logits, placed, scale, off):
        experts_and_rank = block.num_experts * block.rank
        b = lora_b[place.b].view(experts_and_rank, block.out_features)
        y[:, place.columns].addmm_(v, b, alpha=block.scaling)  # [T, E R] @ [E R, O] -> [T, O]


def _mixed(
    u: Tensor,  # (T, sum of E R)
    logits: Tensor,  # (T, sum of E)
    placed: _Blocks,
    scale: Tensor | None,  # (T)
    off: Tensor | None,  # (T)
) -> Iterator[tuple[Block, Place, Tensor]]:
    """Each block with its v (T, E R), without the block's scaling."""
    tokens, (_, start) = u.shape[0], placed[0]
    for _, of_kind in groupby(placed, lambda pair: pair[0].kind):
        same = tuple(of_kind)
        (block, first), (_, last) = same[0], same[-1]
        experts, rank, count = block.num_experts, block.rank, len(same)
        of_u = u[:, first.a.start - start.a.start : last.a.stop - start.a.start]
        of_logits = logits[:, first.experts.start - start.experts.start : last.experts.stop - start.experts.start]
        options = block.options._replace(scaling=1.0)
        softmax, dropped = gate_softmax(of_logits.reshape(tokens * count, experts), u.dtype, options)
        gates, sums = of_kept(softmax, dropped)
        row, column = row_and_column(gates, options)
        if scale is not None:  # it belongs to the factor that the blend multiplies last
            scaled = gates * scale.to(gates.dtype).repeat_interleave(count).unsqueeze(1)
            row, column = (row, scaled.unsqueeze(2)) if options.averages_factors else (scaled.unsqueeze(1), column)
        _, v = mix(row, column, of_u.reshape(tokens * count, -1, rank), options, sums)
        v = v.view(tokens, count, experts * rank)
        if off is not None:
            v = v.masked_fill(off[:, None, None], 0.0)
        for i, (one, place) in enumerate(same):
            yield one, place, v[:, i]
