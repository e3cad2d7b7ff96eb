# SPDX-License-Identifier: Apache-2.0
"""Route: the few experts that each token keeps, and the tokens grouped by expert, so that work grows with top_k and not E.

Every token has `top_k` slots, one for each expert that it keeps. In each slot the tokens are sorted by their expert, on the
device and without synchronising with the host; a tile is then up to BLOCK_T tokens of one expert. There are at most
T / BLOCK_T + E such tiles, so the grid is known in advance, and programs without a tile return at once.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.configs import Tile
from lmoe_kernels.backends.triton.gates import router_logits, softmax_and_kept
from lmoe_kernels.backends.triton.tiles import sum_splits
from lmoe_kernels.options import Options, Sizes


class Route(NamedTuple):
    """Which experts each token keeps, and for each slot the tokens sorted by their expert."""

    gates: Tensor  # (K, T), fp32 or fp64
    experts: Tensor  # (K, T)
    order: Tensor  # (K, T), tokens sorted by expert
    bounds: Tensor  # (K, E + 1), where each expert's tokens begin in `order`


def route_fwd(
    rows: Tensor,  # (T, ...), the tokens
    sizes: Sizes,
    options: Options,
    tile: Tile,
    *,
    logit_parts: Tensor | None = None,  # (splits, T, E)
    gate_bias: Tensor | None = None,  # (E)
    gate_logits: Tensor | None = None,  # (T, E), where logit_parts is None
    logits: Tensor | None = None,  # (T, E), written
) -> Route:
    """The gates of the experts that are kept, and the tokens grouped by expert."""
    K = options.kept(sizes.E)
    gates = rows.new_empty(K, sizes.T, dtype=host.accumulator(rows))
    experts = rows.new_empty(K, sizes.T, dtype=torch.int32)
    host.launch(
        _route_fwd_kernel, (tile.tiles_of(sizes.T),),
        logit_parts, gate_bias, gate_logits, logits, gates, experts, sizes.T,
        SPLITS=1 if logit_parts is None else logit_parts.shape[0], E=sizes.E, TOP_K=K,
        RENORMALIZE=options.gates_sum_to_one(sizes.E), ACC=host.dot_constants(rows)["ACC"], tile=tile,
    )  # fmt: skip
    return Route(gates, experts, *by_expert(experts, sizes.E))


def by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The `order` (K, T) and `bounds` (K, E + 1) of a route, from the experts (K, T) that its tokens keep."""
    ordered, order = experts.sort(dim=1, stable=True)
    first = torch.arange(num_experts + 1, dtype=torch.int32, device=experts.device).expand(len(experts), -1).contiguous()
    return order.int(), torch.searchsorted(ordered, first, out_int32=True)


@triton.jit(do_not_specialize=["T"])
def _route_fwd_kernel(
    logit_parts_ptr,  # (SPLITS, T, E) or None
    gate_bias_ptr,  # (E) or None
    gate_logits_ptr,  # (T, E), where logit_parts is None
    logits_ptr,  # (T, E), written; or None
    gates_ptr,  # (K, T), written
    experts_ptr,  # (K, T), written
    T,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The slots of a tile of tokens, in the order of the experts' indices."""
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    logits = tl.zeros((BLOCK_T, BLOCK_E), ACC)
    if logit_parts_ptr is not None:
        logits = sum_splits(logit_parts_ptr, t, e, T, E, SPLITS)
    logits = router_logits(logits, gate_bias_ptr, gate_logits_ptr, logits_ptr, t, e, T, E)
    softmax, kept = softmax_and_kept(logits, e, E, TOP_K, RENORMALIZE)
    for slot in range(TOP_K):
        expert = tl.min(tl.where(kept, e[None, :], BLOCK_E), axis=1)
        is_expert = e[None, :] == expert[:, None]
        at = tl.cast(slot, tl.int64) * T + t
        tl.store(gates_ptr + at, tl.sum(tl.where(is_expert, softmax, 0.0), axis=1), mask=t < T)
        tl.store(experts_ptr + at, expert, mask=t < T)
        kept = kept & (is_expert == 0)


@triton.jit
def tile_of_group(
    order_ptr,  # (T), of one slot
    bounds_ptr,  # (E + 1), of one slot
    program,
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Returns (expert, tokens). expert == E marks an idle program; unused token slots hold T, which is out of range."""
    begin = tl.load(bounds_ptr + e, mask=e < E, other=0)
    end = tl.load(bounds_ptr + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_T)
    expert = tl.sum(((tl.cumsum(tiles, axis=0) <= program) & (e < E)).to(tl.int32), axis=0)
    tile = program - tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    at = tl.sum(tl.where(e == expert, begin, 0), axis=0) + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    used = at < tl.sum(tl.where(e == expert, end, 0), axis=0)
    return expert, tl.load(order_ptr + at, mask=used, other=T)
