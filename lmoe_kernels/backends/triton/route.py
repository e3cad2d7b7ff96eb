# SPDX-License-Identifier: Apache-2.0
"""Route: the few experts that each token keeps, and the tokens grouped by expert, so that work grows with top_k and not E.

Every token has `top_k` slots, one for each expert that it keeps. In each slot the tokens are sorted by their expert, on the
device and without synchronising with the host; a tile is then up to BLOCK_T tokens of one expert. There are at most
T / BLOCK_T + E such tiles, so the grid is known in advance, and programs without a tile return at once.

The sort is a counting sort in two kernels. The first chooses the experts and counts them in each tile of tokens. In the
second the program of a tile adds up the counts of all tiles, which tells where its own tokens go. There are no atomics, and
tokens of one expert stay in their order, so that results are deterministic.

A route is one int32 tensor (K, 2 T + E + 1), which the forward saves for the backward. The row of a slot has three parts:

    experts  (T)      the expert of each token
    order    (T)      the tokens sorted by expert
    bounds   (E + 1)  where each expert's tokens begin in `order`; the last number is T
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.configs import block_of
from lmoe_kernels.backends.triton.cost import ceil_div
from lmoe_kernels.backends.triton.gates import router_logits, softmax_and_kept
from lmoe_kernels.backends.triton.plans import Tile
from lmoe_kernels.backends.triton.tiles import let_next_kernel_start, load_rows, sum_splits, wait_for_previous_kernel
from lmoe_kernels.options import Options, Sizes

# Every program of the sort reads the counts of all tiles, so beyond this number more tokens make larger tiles. Then the
# counts take at most 512 K E bytes, and all programs together read 65536 K E bytes of them.
MOST_TILES = 128


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
) -> tuple[Tensor, Tensor]:
    """The gates of the experts that are kept (K, T), in fp32 or fp64, and the route."""
    T, E, K = sizes.T, sizes.E, options.kept(sizes.E)
    tokens_of_tile = block_of(ceil_div(T, MOST_TILES), least=tile.T, most=1 << 30)
    tiles = max(1, ceil_div(T, tokens_of_tile))  # without tokens one tile still writes the bounds
    gates = rows.new_empty(K, T, dtype=host.accumulator(rows))
    route = rows.new_empty(options.route_shape(sizes), dtype=torch.int32)
    counts = rows.new_empty(K, tiles, E, dtype=torch.int32)
    host.launch(
        _route_fwd_kernel, (tiles,),
        logit_parts, gate_bias, gate_logits, logits, gates, route, counts, T, tokens_of_tile,
        SPLITS=1 if logit_parts is None else logit_parts.shape[0], E=E, TOP_K=K,
        RENORMALIZE=options.gates_sum_to_one(E), ACC=host.dot_constants(rows)["ACC"], tile=tile,
    )  # fmt: skip
    host.launch(_group_fwd_kernel, (tiles, K), counts, route, T, tokens_of_tile, E=E, tile=tile)
    return gates, route


@triton.jit(do_not_specialize=["T", "tokens_of_tile"])
def _route_fwd_kernel(
    logit_parts_ptr,  # (SPLITS, T, E) or None
    gate_bias_ptr,  # (E) or None
    gate_logits_ptr,  # (T, E), where logit_parts is None
    logits_ptr,  # (T, E), written; or None
    gates_ptr,  # (K, T), written
    route_ptr,  # (K, 2 T + E + 1), experts written
    counts_ptr,  # (K, tiles, E), written: how many of the tile's tokens have an expert in a slot
    T,
    tokens_of_tile,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """The slots of a tile of tokens, in the order of the experts' indices, and how often each expert comes in a slot."""
    wait_for_previous_kernel(PDL)
    tile, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    tiles, first = tl.cdiv(T, tokens_of_tile), tile * tokens_of_tile
    for start in range(first, first + tl.minimum(tokens_of_tile, T - first), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        logits = tl.zeros((BLOCK_T, BLOCK_E), ACC)
        if logit_parts_ptr is not None:
            logits = sum_splits(logit_parts_ptr, t, e, T, E, SPLITS)
        logits = router_logits(logits, gate_bias_ptr, gate_logits_ptr, logits_ptr, t, e, T, E)
        softmax, kept = softmax_and_kept(logits, e, E, TOP_K, RENORMALIZE)
        tl.debug_barrier()  # every thread sees the counts of the tokens before
        for slot in range(TOP_K):
            expert = tl.min(tl.where(kept, e[None, :], BLOCK_E), axis=1)
            is_expert = e[None, :] == expert[:, None]
            experts, _, _ = parts_of_slot(route_ptr, slot, T, E)
            tl.store(experts + t, expert, mask=t < T)
            gate = tl.sum(tl.where(is_expert, softmax, 0.0), axis=1)
            tl.store(gates_ptr + tl.cast(slot, tl.int64) * T + t, gate, mask=t < T)
            counts = counts_ptr + (slot * tiles + tile) * E + e
            before = tl.load(counts, mask=e < tl.where(start > first, E, 0), other=0)
            here = tl.sum((is_expert & (t < T)[:, None]).to(tl.int32), axis=0)
            tl.store(counts, before + here, mask=e < E)  # each after its own load, which it depends on
            kept = kept & (is_expert == 0)


@triton.jit(do_not_specialize=["T", "tokens_of_tile"])
def _group_fwd_kernel(
    counts_ptr,  # (K, tiles, E)
    route_ptr,  # (K, 2 T + E + 1), order and bounds written
    T,
    tokens_of_tile,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Put the tokens of a tile where one slot's order has them: behind those of lower experts and of earlier tiles."""
    wait_for_previous_kernel(PDL)
    tile, slot, e = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_E)
    experts, order, bounds = parts_of_slot(route_ptr, slot, T, E)
    tiles = tl.cdiv(T, tokens_of_tile)
    in_all, before = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, tiles, BLOCK_T):
        other = start + tl.arange(0, BLOCK_T)
        counts = load_rows(counts_ptr + slot * tiles * E, other, e, tiles, E)
        in_all += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < tile)[:, None], counts, 0), axis=0)
    let_next_kernel_start(PDL)
    end = tl.cumsum(in_all, axis=0)
    first, at = tile * tokens_of_tile, end - in_all + before  # where the next token of each expert goes
    if T - first <= tokens_of_tile:  # one program for each slot
        tl.store(bounds, 0)
        tl.store(bounds + 1 + e, end, mask=e < E)
    for start in range(first, first + tl.minimum(tokens_of_tile, T - first), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        expert = tl.load(experts + t, mask=t < T, other=0)  # the others come last and displace none
        is_expert = e[None, :] == expert[:, None]
        upto = tl.cumsum(is_expert.to(tl.int32), axis=0)
        place = tl.sum(tl.where(is_expert, at[None, :] + upto - 1, 0), axis=1)
        tl.store(order + place, t, mask=t < T)
        at += tl.sum(is_expert.to(tl.int32), axis=0)


@triton.jit
def parts_of_slot(
    route_ptr,  # (K, 2 T + E + 1)
    slot,
    T,
    E: tl.constexpr,
):
    """Where the experts (T), the order (T) and the bounds (E + 1) of a slot begin."""
    tokens = tl.cast(T, tl.int64)
    experts = route_ptr + slot * (2 * tokens + E + 1)
    return experts, experts + tokens, experts + 2 * tokens


@triton.jit
def tile_of_group(
    route_ptr,  # (K, 2 T + E + 1)
    slot,
    program,
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Returns (expert, tokens). expert == E marks an idle program; unused token slots hold T, which is out of range."""
    _, order, bounds = parts_of_slot(route_ptr, slot, T, E)
    begin = tl.load(bounds + e, mask=e < E, other=0)
    end = tl.load(bounds + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_T)
    expert = tl.sum(((tl.cumsum(tiles, axis=0) <= program) & (e < E)).to(tl.int32), axis=0)
    tile = program - tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    at = tl.sum(tl.where(e == expert, begin, 0), axis=0) + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    used = at < tl.sum(tl.where(e == expert, end, 0), axis=0)
    return expert, tl.load(order + at, mask=used, other=T)
