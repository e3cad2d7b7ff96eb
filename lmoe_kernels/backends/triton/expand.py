# SPDX-License-Identifier: Apache-2.0
"""Expand: multiply few columns with a factor, up to F features. In the forward v with B, in the backward du with A.

`expand_fwd` can add a second product, the backward's dlogits with gate_weight. `grouped_expand_fwd` uses for each token only
the experts that it keeps.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.configs import Tile, ceil_div
from lmoe_kernels.backends.triton.route import Route, tile_of_group
from lmoe_kernels.backends.triton.tiles import expand_tile, load_rows, write_tile


def expand_fwd(
    v: Tensor,  # (T, E, R)
    factor: Tensor,  # (E, R, F)
    out: Tensor,  # (T, F), written
    tile: Tile,
    *,
    dlogits: Tensor | None = None,  # (T, E)
    gate_weight: Tensor | None = None,  # (E, F), where dlogits is given
    base: Tensor | None = None,  # (F) or (T, F)
    scaling: float = 1.0,
) -> None:
    """out = base + scaling * (v factor + dlogits gate_weight)."""
    T, F = out.shape
    E = 1 if gate_weight is None else gate_weight.shape[0]
    host.launch(
        _expand_fwd_kernel, (tile.tiles_of(T), ceil_div(F, tile.F)),
        v, factor, dlogits, gate_weight, base, host.row_stride(base), out, scaling, T, F,
        ER=factor.shape[0] * factor.shape[1], E=E, **host.dot_constants(v), tile=tile,
    )  # fmt: skip


def grouped_expand_fwd(
    v: Tensor,  # (T, K, R)
    factor: Tensor,  # (E, R, F)
    route: Route,
    out: Tensor,  # (T, F), written
    tile: Tile,
    *,
    base: Tensor | None = None,  # (F) or (T, F), which may be out itself
    scaling: float = 1.0,
) -> None:
    """out[t] = base[t] + scaling * sum_slots v[t, slot] factor[e], where e is the expert of the slot.

    The launch of each slot adds to what the one before wrote. Each token comes once in a launch: no atomics are needed, and
    results are deterministic.
    """
    E, R, F = factor.shape
    K, T = route.order.shape
    for slot in range(K):
        host.launch(
            _grouped_expand_fwd_kernel, (tile.tiles_of(T) + E, ceil_div(F, tile.F)),
            v, factor, route.order, route.bounds, base, host.row_stride(base), out, scaling, slot, T, F,
            E=E, R=R, TOP_K=K, **host.dot_constants(v), tile=tile,
        )  # fmt: skip
        base = out


@triton.jit(do_not_specialize=["T"])
def _expand_fwd_kernel(
    v_ptr,  # (T, ER)
    factor_ptr,  # (ER, F)
    dlogits_ptr,  # (T, E) or None
    gate_ptr,  # (E, F), where dlogits is given
    base_ptr, base_stride_t,  # (T, F), (F), or None
    out_ptr,  # (T, F), written
    scaling,
    T,
    F,
    ER: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of tokens and features of base + scaling * (v factor + dlogits gate)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros((BLOCK_T, BLOCK_F), ACC)
    for start in range(0, ER, BLOCK_ER):
        er = start + tl.arange(0, BLOCK_ER)
        acc = expand_tile(load_rows(v_ptr, t, er, T, ER), factor_ptr, acc, er, f, F, ER, PRECISION)
    if dlogits_ptr is not None:
        for start in range(0, E, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            acc = expand_tile(load_rows(dlogits_ptr, t, e, T, E), gate_ptr, acc, e, f, F, E, PRECISION)
    write_tile(acc * scaling, base_ptr, base_stride_t, out_ptr, t, f, T, F)


@triton.jit(do_not_specialize=["T", "slot"])
def _grouped_expand_fwd_kernel(
    v_ptr,  # (T, K, R)
    factor_ptr,  # (E, R, F)
    order_ptr,  # (K, T)
    bounds_ptr,  # (K, E + 1)
    base_ptr, base_stride_t,  # (T, F), (F), or None; the output itself from the second slot on
    out_ptr,  # (T, F), written
    scaling,
    slot,
    T,
    F,
    E: tl.constexpr,
    R: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of features of what one slot adds to a tile of one expert's tokens."""
    e, f = tl.arange(0, BLOCK_E), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    bounds, order = bounds_ptr + slot * (E + 1), order_ptr + tl.cast(slot, tl.int64) * T
    expert, t = tile_of_group(order, bounds, tl.program_id(0), e, T, E, BLOCK_T)
    if expert < E:
        r = tl.arange(0, BLOCK_ER)
        mask = (t < T)[:, None] & (r < R)[None, :]
        row = t.to(tl.int64) * TOP_K + slot
        v = tl.load(v_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0)
        factor = factor_ptr + expert.to(tl.int64) * R * F
        acc = expand_tile(v, factor, tl.zeros((BLOCK_T, BLOCK_F), ACC), r, f, F, R, PRECISION)
        write_tile(acc * scaling, base_ptr, base_stride_t, out_ptr, t, f, T, F)
