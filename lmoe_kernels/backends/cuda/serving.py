# SPDX-License-Identifier: Apache-2.0
"""Serving in the `cuda` backend: up to 16 tokens in one launch for all blocks, more tokens block by block."""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.configs import PLANS, STACKED_BLOCKS, StackedPlan, stacked_plan
from lmoe_kernels.backends.cuda.forward import forward
from lmoe_kernels.options import Block, Place, StackedFactors, TokenGroups, places_of


def add_stacked(
    y: Tensor,  # (T, N), changed in place
    x: Tensor,  # (T, I)
    factors: StackedFactors,
    blocks: tuple[Block, ...],
    groups: TokenGroups | None,
) -> None:
    """Add the delta of every block to its columns of y; see `lmoe_kernels.reference.add_stacked` for the contract."""
    if factors.gate_logits is not None:
        factors = factors._replace(gate_logits=factors.gate_logits.contiguous())
    if groups is not None and groups.scale is not None:
        groups = groups._replace(scale=groups.scale.contiguous())
    chip, has_gate = extension.device_of(extension.queue(x)[0]), factors.gate_weight is not None
    for first in range(0, len(blocks), STACKED_BLOCKS):
        some, part = blocks, factors
        if len(blocks) > STACKED_BLOCKS:
            some, part = _part(factors, blocks, first)
        plan = stacked_plan(*x.shape, some, has_gate, x.element_size(), chip)
        if plan is not None:
            _add_in_one_launch(y, x, part, some, groups, plan)
        else:
            for block, place in zip(some, places_of(some), strict=True):
                _add_block(y, x, part, block, place, groups)


def _part(factors: StackedFactors, blocks: tuple[Block, ...], start: int) -> tuple[tuple[Block, ...], StackedFactors]:
    """The blocks of one launch, and their factors."""
    end = start + STACKED_BLOCKS
    places = places_of(blocks)[start:end]
    lora_a, lora_b, gate_weight, gate_bias, logits = factors
    rows, numbers = (slice(getattr(places[0], name).start, getattr(places[-1], name).stop) for name in ("a", "b"))
    experts = slice(places[0].experts.start, places[-1].experts.stop)
    return blocks[start:end], StackedFactors(
        lora_a[rows],
        lora_b[numbers],
        None if gate_weight is None else gate_weight[experts],
        None if gate_bias is None else gate_bias[experts],
        None if logits is None else logits[:, experts],
    )


def _add_in_one_launch(
    y: Tensor,
    x: Tensor,
    factors: StackedFactors,
    blocks: tuple[Block, ...],
    groups: TokenGroups | None,
    plan: StackedPlan,
) -> None:
    library, last = extension.library(), places_of(blocks)[-1]
    group, scale = (None, None) if groups is None else groups
    columns = last.a.stop + (0 if factors.gate_weight is None else last.experts.stop)
    totals = x.new_empty(x.shape[0], columns, dtype=torch.float32)
    params = _params(library, extension.DTYPES[x.dtype], *x.shape, blocks, plan)
    library.add_stacked(params.with_tensors(y, x, factors, group, scale, totals), *extension.queue(x))


@lru_cache(PLANS)
def _params(
    library: ModuleType, dtype: int, tokens: int, features: int, blocks: tuple[Block, ...], plan: StackedPlan
) -> Any:
    """The parameters of a launch without its tensors: to make them takes longer than to copy them."""
    return library.StackedParams(dtype, tokens, features, blocks, *plan)


def _add_block(
    y: Tensor, x: Tensor, factors: StackedFactors, block: Block, place: Place, groups: TokenGroups | None
) -> None:
    """Add one block by the forward of one mixture, which adds to its columns of y or makes a delta to be scaled."""
    columns, of_block = y[:, place.columns], factors.of_block(block, place)
    logits, bias = of_block.gate_logits, of_block.gate_bias
    if logits is not None:
        of_block = of_block._replace(gate_logits=logits.contiguous() if bias is None else logits + bias, gate_bias=None)
    scale = None if groups is None else groups.scale
    result, _ = forward(x, of_block, columns if scale is None else None, block.options, save=False)
    if scale is not None:
        result = columns + result * scale[:, None]
    if groups is not None:  # selected, because a product with 0 would not be 0 if an expert has a NaN
        result = result.where((groups.group == block.group)[:, None], columns)
    columns.copy_(result)
