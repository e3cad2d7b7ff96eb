# SPDX-License-Identifier: Apache-2.0
"""Serving on ATen: all blocks share one product with x for u and one for the logits; each product with B adds to y in place.

Neighbouring blocks of one kind are mixed together, as if they were more tokens. torch.compile may trace these functions, see
`lmoe_kernels.serving`: while it does, no branch depends on the number of tokens.
"""

from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_kernels.backends.torch.forward import gate_softmax, in_dtype, of_kept
from lmoe_kernels.options import Block, Options, Place, StackedFactors, TokenGroups, places_of
from lmoe_kernels.products import linear_wide
from lmoe_kernels.tracing import constant_when_traced

# 1024 tokens took 17 % less time in parts of 256 than all at once: the intermediate results stay in the cache (Intel Xeon, 1
# thread, 2026-11-26).
_PART = 256

_Placed = tuple[tuple[Block, Place], ...]


class _Kind(NamedTuple):
    """Neighbouring blocks with the same sizes of experts and the same options, which are mixed together."""

    options: Options
    placed: _Placed


def add_stacked(
    y: Tensor,  # (T, N), changed in place
    x: Tensor,  # (T, I)
    factors: StackedFactors,
    blocks: tuple[Block, ...],
    groups: TokenGroups | None,
) -> None:
    """Add the delta of every block to its columns of y; see `lmoe_kernels.reference.add_stacked` for the contract."""
    for group, kinds in _by_group(blocks):
        if groups is None:
            _add_group(y, x, factors, kinds, None, None)
        elif not _may_wait(x):
            _add_group(y, x, factors, kinds, groups.scale, groups.group != group)
        else:
            _add_to_some(y, x, factors, kinds, groups, groups.group == group)


def _by_group(blocks: tuple[Block, ...]) -> tuple[tuple[int, tuple[_Kind, ...]], ...]:
    return _cached_by_group(blocks)


constant_when_traced(_by_group)  # torch.compile does not trace a cache


@lru_cache(4096)
def _cached_by_group(blocks: tuple[Block, ...]) -> tuple[tuple[int, tuple[_Kind, ...]], ...]:
    """The neighbouring blocks of one group, by kind."""
    placed = zip(blocks, places_of(blocks), strict=True)
    groups = []
    for group, of_group in groupby(placed, lambda pair: pair[0].group):
        of_kinds = (tuple(of_kind) for _, of_kind in groupby(of_group, lambda pair: (pair[0].kind, pair[0].options)))
        groups.append((group, tuple(_Kind(placed[0][0].options, placed) for placed in of_kinds)))
    return tuple(groups)


def _may_wait(x: Tensor) -> bool:
    """Whether the number of a group's tokens can be read: on a GPU that would wait, and no CUDA graph could hold it."""
    return not x.is_cuda


def _add_to_some(
    y: Tensor, x: Tensor, factors: StackedFactors, kinds: tuple[_Kind, ...], groups: TokenGroups, chosen: Tensor
) -> None:
    """Add the blocks of a group to the tokens that are chosen: the other tokens cost nothing."""
    tokens = chosen.nonzero().squeeze(1)
    if len(tokens) == len(x):
        _add_group(y, x, factors, kinds, groups.scale, None)
    elif len(tokens) > 0:
        logits, some = factors.gate_logits, y[tokens]
        if logits is not None:
            factors = factors._replace(gate_logits=logits[tokens])
        scale = None if groups.scale is None else groups.scale[tokens]
        _add_group(some, x[tokens], factors, kinds, scale, None)
        y[tokens] = some


def _add_group(
    y: Tensor,  # (T, N), changed in place
    x: Tensor,  # (T, I)
    factors: StackedFactors,
    kinds: tuple[_Kind, ...],
    scale: Tensor | None,  # (T)
    off: Tensor | None,  # (T) bool, the tokens that get nothing
) -> None:
    if not torch.compiler.is_compiling() and _may_wait(x) and len(x) > _PART:
        for start in range(0, len(x), _PART):
            part = slice(start, start + _PART)
            logits = None if factors.gate_logits is None else factors.gate_logits[part]
            of_part = factors._replace(gate_logits=logits)
            _add_group(y[part], x[part], of_part, kinds, None if scale is None else scale[part], None)
        return
    (_, first), (_, last) = kinds[0].placed[0], kinds[-1].placed[-1]
    lora_a, lora_b, gate_weight, gate_bias, logits = factors
    x, experts = in_dtype(x, lora_a.dtype), slice(first.experts.start, last.experts.stop)
    u = F.linear(x, lora_a[first.a.start : last.a.stop])  # [T, I] @ [I, sum E R] -> [T, sum E R]
    if gate_weight is not None:
        logits = linear_wide(x, gate_weight[experts])  # [T, I] @ [I, sum E] -> [T, sum E]
    else:
        assert logits is not None
        logits = logits[:, experts]
    if gate_bias is not None:
        logits = logits + gate_bias[experts]
    deltas: list[tuple[slice, Tensor]] = []
    for kind in kinds:
        v = _mix(u, logits, kind, first, scale)
        for (block, place), of_block in zip(kind.placed, in_dtype(v, lora_b.dtype).unbind(1), strict=True):
            b = lora_b[place.b].view(-1, block.out_features)
            if off is not None:  # a selection: what is not finite in a foreign adapter must not reach these tokens
                deltas.append((place.columns, torch.mm(of_block, b).masked_fill(off[:, None], 0.0)))
            elif b.dtype is y.dtype:
                y[:, place.columns].addmm_(of_block, b)  # [T, E R] @ [E R, O] -> [T, O]
            else:
                deltas.append((place.columns, torch.mm(of_block, b)))
    for columns, delta in _joined(deltas):  # cast before the sum: ATen adds tensors of two dtypes in half the speed
        y[:, columns].add_(delta.to(y.dtype))


def _joined(deltas: list[tuple[slice, Tensor]]) -> list[tuple[slice, Tensor]]:
    """The deltas, joined to one for torch.compile if their columns follow one another.

    It computes them in place of the joined one, and adds that. Sums with several parts of y would become one kernel that
    finds out for each element in which of them it is.
    """
    if not torch.compiler.is_compiling() or not deltas:
        return deltas
    if any(one.stop != other.start for (one, _), (other, _) in pairwise(deltas)):
        return deltas
    columns = slice(deltas[0][0].start, deltas[-1][0].stop)
    return [(columns, torch.cat([delta for _, delta in deltas], dim=1))]


def _mix(
    u: Tensor,  # (T, sum of E R)
    logits: Tensor,  # (T, sum of E)
    kind: _Kind,  # n blocks
    start: Place,  # of the first block in u and logits
    scale: Tensor | None,  # (T)
) -> Tensor:
    """v (T, n, E R) of these blocks, scaled, in the dtype of the gates."""
    options, placed = kind.options, kind.placed  # torch.compile cannot unpack a named tuple that is a constant (torch 2.11)
    (block, first), (_, last) = placed[0], placed[-1]
    tokens, experts, rank, count = len(u), block.num_experts, block.rank, len(placed)
    of_u = u[:, first.a.start - start.a.start : last.a.stop - start.a.start].reshape(tokens * count, -1, rank)
    of_logits = logits[:, first.experts.start - start.experts.start : last.experts.stop - start.experts.start]
    softmax, dropped = gate_softmax(of_logits.reshape(tokens * count, experts), u.dtype, options)
    gates, sums = of_kept(softmax, dropped)
    scaled = gates if options.scaling == 1.0 else gates * options.scaling
    if scale is not None:
        scaled = scaled * scale.to(gates.dtype).repeat_interleave(count).unsqueeze(1)
    if not options.averages_factors:
        v = scaled.unsqueeze(2) * of_u
    elif block.shared_a:  # the blend is u itself, times the gates' sum
        v = scaled.unsqueeze(2) * (of_u if sums is None else sums * of_u)
    else:  # a product and a sum, which torch.compile fuses with what is around them; it cannot fuse a bmm
        v = gates.unsqueeze(2) * (scaled.unsqueeze(2) * of_u).sum(1, keepdim=True)
    return v.view(tokens, count, experts * rank)
