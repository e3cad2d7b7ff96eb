"""Few experts of many: tokens grouped by expert, so that work grows with top_k and not with E.

Every token has `top_k` slots, one for each expert it keeps. For each slot the tokens are sorted by their expert, on the
device and without a word to the host; a tile is then up to BLOCK_T tokens of one expert, gathered. There are at most
T / BLOCK_T + E of those, so the grid is known beforehand and what is left over returns at once.

    forward     _shrink_fwd_kernel (gate alone), _route_fwd_kernel, _grouped_shrink_fwd_kernel, _grouped_mix_fwd_kernel,
                _grouped_expand_fwd_kernel for each slot
    backward    _route_fwd_kernel, _grouped_shrink_fwd_kernel, _grouped_mix_bwd_kernel, _grouped_wgrad_bwd_kernel,
                _expand_fwd_kernel (gate alone), _grouped_expand_fwd_kernel for each slot

An expand adds to what the slot before it wrote: every token once in each launch, so no atomics and the same bits every time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe_kernels.backends.triton.configs import Tile, ceil_div
from lmoe_kernels.backends.triton.grouped_kernels import (
    _grouped_expand_fwd_kernel,
    _grouped_mix_bwd_kernel,
    _grouped_mix_fwd_kernel,
    _grouped_shrink_fwd_kernel,
    _grouped_wgrad_bwd_kernel,
    _route_fwd_kernel,
)
from lmoe_kernels.backends.triton.launch import accumulator, dot_constants, launch, row_stride


@dataclass(frozen=True)
class Route:
    """Which experts every token keeps, and the tokens in the order of their experts, slot by slot."""

    gates: Tensor  # (K, T), fp32 or fp64
    experts: Tensor  # (K, T)
    order: Tensor  # (K, T), tokens sorted by expert
    bounds: Tensor  # (K, E + 1), where in `order` the tokens of an expert begin


def route(
    logit_parts: Tensor | None,  # (SPLITS, T, E)
    gate_logits: Tensor | None,  # (T, E), where logit_parts is None
    logits: Tensor | None,  # (T, E), written
    like: Tensor,  # (T, ...), the tokens
    mix: dict[str, int],
    tile: Tile,
) -> Route:
    """The gates of the experts kept, and the grouping of the tokens."""
    T, K, wide = like.shape[0], mix["TOP_K"], accumulator(like)
    gates, experts = like.new_empty(K, T, dtype=wide), like.new_empty(K, T, dtype=torch.int32)
    launch(
        _route_fwd_kernel, (tile.tiles_of(T),),
        logit_parts, gate_logits, logits, gates, experts, T,
        SPLITS=1 if logit_parts is None else logit_parts.shape[0], E=mix["E"], TOP_K=K, RENORMALIZE=mix["RENORMALIZE"],
        ACC=dot_constants(like)["ACC"], tile=tile,
    )  # fmt: skip
    return Route(gates, experts, *by_expert(experts, mix["E"]))


def by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The `order` (K, T) and `bounds` (K, E + 1) of a route, from the experts (K, T) that its tokens keep."""
    ordered, order = experts.sort(dim=1, stable=True)
    first = torch.arange(num_experts + 1, dtype=torch.int32, device=experts.device).expand(len(experts), -1).contiguous()
    return order.int(), torch.searchsorted(ordered, first, out_int32=True)


def shrink(rows: Tensor, factor: Tensor, route: Route, scaling: float, out: Tensor, by_expert: bool, tile: Tile) -> None:
    """scaling * factor[e] rows[t] for the experts that each token keeps: (T, F), (E, R, F) to out[t, e] or out[t, slot]."""
    E, R, F = factor.shape
    K, T = route.order.shape
    launch(
        _grouped_shrink_fwd_kernel, (tile.tiles_of(T) + E, K),
        rows, rows.stride(0), factor, route.order, route.bounds, out, scaling, T, F,
        E=E, R=R, OUT_ROWS=out.shape[1], BY_EXPERT=by_expert, **dot_constants(rows), tile=tile,
    )  # fmt: skip


def mix_fwd(u: Tensor, route: Route, v: Tensor, mix: dict[str, int], tile: Tile) -> None:
    """u (T, E, R) to v (T, K, R)."""
    launch(
        _grouped_mix_fwd_kernel, (tile.tiles_of(u.shape[0]),),
        u, route.gates, route.experts, v, u.shape[0], E=mix["E"], R=mix["R"], MIX=mix["MIX"], TOP_K=mix["TOP_K"], tile=tile,
    )  # fmt: skip


def mix_bwd(
    u: Tensor,  # (T, E, R)
    dv: Tensor,  # (T, K, R)
    route: Route,
    logits: Tensor,  # (T, E)
    dlogits_in: Tensor | None,  # (T, E)
    du: Tensor | None,  # (T, K, R), written
    v: Tensor | None,  # (T, K, R), written
    dlogits: Tensor,  # (T, E), written
    mix: dict[str, int],
    tile: Tile,
) -> None:
    """The gradients of the mix, for the experts kept."""
    launch(
        _grouped_mix_bwd_kernel, (tile.tiles_of(u.shape[0]),),
        u, dv, route.gates, route.experts, None if mix["RENORMALIZE"] else logits, dlogits_in, du, v, dlogits, u.shape[0],
        E=mix["E"], R=mix["R"], MIX=mix["MIX"], TOP_K=mix["TOP_K"], tile=tile,
    )  # fmt: skip


def expand(v: Tensor, factor: Tensor, route: Route, base: Tensor | None, scaling: float, out: Tensor, tile: Tile) -> None:
    """out = base + scaling * sum_slots v[t, slot] factor[e of slot]; `base` may be `out` itself."""
    E, R, F = factor.shape
    K, T = route.order.shape
    for slot in range(K):
        launch(
            _grouped_expand_fwd_kernel, (tile.tiles_of(T) + E, ceil_div(F, tile.F)),
            v, factor, route.order, route.bounds, base, row_stride(base), out, scaling, slot, T, F,
            E=E, R=R, TOP_K=K, **dot_constants(v), tile=tile,
        )  # fmt: skip
        base = out


def wgrad(rows: Tensor, coefficients: Tensor, parameter: Tensor, route: Route, scaling: float, tile: Tile) -> Tensor:
    """scaling * sum over an expert's tokens of coefficients[t, slot]^T rows[t], in the parameter's dtype."""
    E, R, F = parameter.shape
    grad = rows.new_empty(parameter.shape, dtype=parameter.dtype)
    launch(
        _grouped_wgrad_bwd_kernel, (ceil_div(F, tile.F), E),
        rows, rows.stride(0), coefficients, route.order, route.bounds, grad, scaling, rows.shape[0], F,
        E=E, R=R, TOP_K=route.order.shape[0], **dot_constants(rows), tile=tile,
    )  # fmt: skip
    return grad
