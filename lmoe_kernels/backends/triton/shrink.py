# SPDX-License-Identifier: Apache-2.0
"""Shrink: project rows of F features onto a factor of few rows. In the forward x onto A, in the backward dy onto B.

`shrink_fwd` computes partial sums over parts of the features (split-K), which the mix or the route adds up.
`grouped_shrink_fwd` computes for each token only the experts that it keeps.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.cost import ceil_div
from lmoe_kernels.backends.triton.plans import Tile
from lmoe_kernels.backends.triton.route import tile_of_group
from lmoe_kernels.backends.triton.tiles import let_next_kernel_start, shrink_tile, store_rows, wait_for_previous_kernel


def shrink_fwd(
    rows: Tensor,  # (T, F)
    factor: Tensor,  # (E, R, F)
    gate_weight: Tensor | None,  # (E, F)
    splits: int,
    tile: Tile,
) -> tuple[Tensor, Tensor | None]:
    """Partial sums of rows factor^T and rows gate_weight^T: (splits, T, E R) and (splits, T, E)."""
    T = rows.shape[0]
    experts, R, F = factor.shape
    ER, E = experts * R, 1 if gate_weight is None else gate_weight.shape[0]
    acc = host.accumulator(rows)
    new = rows.new_zeros if F == 0 else rows.new_empty
    parts = new(splits, T, ER, dtype=acc)
    gate_parts = None if gate_weight is None else new(splits, T, E, dtype=acc)
    if F == 0:  # the kernel relies on having features
        return parts, gate_parts
    features_of_split = ceil_div(F, splits * tile.F) * tile.F
    host.launch(
        _shrink_fwd_kernel, (tile.tiles_of(T), ceil_div(ER, tile.ER), splits),
        rows, rows.stride(0), factor, gate_weight, parts, gate_parts, T, F, features_of_split,
        ER=ER, E=E, **host.dot_constants(rows), tile=tile,
    )  # fmt: skip
    return parts, gate_parts


def grouped_shrink_fwd(
    rows: Tensor,  # (T, F)
    factor: Tensor,  # (E, R, F)
    route: Tensor,  # (K, 2 T + E + 1)
    out: Tensor,  # (T, E, R) or (T, K, R), written
    tile: Tile,
    *,
    by_expert: bool,  # whether out is (T, E, R)
    scaling: float = 1.0,
) -> None:
    """out[t, e] or out[t, slot] = scaling * factor[e] rows[t], for the experts e that token t keeps."""
    E, R, F = factor.shape
    K, T = route.shape[0], rows.shape[0]
    host.launch(
        _grouped_shrink_fwd_kernel, (tile.tiles_of(T) + E, K),
        rows, rows.stride(0), factor, route, out, scaling, T, F,
        E=E, R=R, OUT_ROWS=out.shape[1], BY_EXPERT=by_expert, **host.dot_constants(rows), tile=tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _shrink_fwd_kernel(
    rows_ptr, stride_t,  # (T, F)
    factor_ptr,  # (ER, F)
    gate_ptr,  # (E, F) or None
    parts_ptr,  # (SPLITS, T, ER), written
    gate_parts_ptr,  # (SPLITS, T, E), written; None where gate is
    T,
    F,
    features_of_split,  # a multiple of BLOCK_F
    ER: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The partial sum of one tile of tokens over one split of the features, for some rows of the factor."""
    wait_for_previous_kernel(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    er, e = tl.program_id(1) * BLOCK_ER + tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    f_from = split * features_of_split
    f_to = tl.minimum(F, f_from + features_of_split)
    if rows_ptr.dtype.element_ty.primitive_bitwidth == 16:  # fp32 has no wgmma
        tl.assume(f_to > f_from)  # else Triton 3.6 and its ptxas serialise wgmma (warning C7515)
    part, gate_part = shrink_tile(
        rows_ptr, stride_t, factor_ptr, gate_ptr, t, er, e, f_from, f_to, T, F, ER, E, ACC, PRECISION, BLOCK_F
    )
    first_token = split.to(tl.int64) * T
    store_rows(part, parts_ptr + first_token * ER, t, er, T, ER)
    let_next_kernel_start(PDL)  # in front of both stores it makes fp32 spill on sm_90 (Triton 3.7.1, 2026-11-26)
    if gate_ptr is not None and tl.program_id(1) == 0:
        store_rows(gate_part, gate_parts_ptr + first_token * E, t, e, T, E)


@triton.jit(do_not_specialize=["T"])
def _grouped_shrink_fwd_kernel(
    rows_ptr, stride_t,  # (T, F)
    factor_ptr,  # (E, R, F)
    route_ptr,  # (K, 2 T + E + 1)
    out_ptr,  # (T, OUT_ROWS, R), written
    scaling,
    T,
    F,
    E: tl.constexpr,
    R: tl.constexpr,
    OUT_ROWS: tl.constexpr,  # E or K
    BY_EXPERT: tl.constexpr,  # which of the two
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's tokens, projected onto the expert's factor."""
    wait_for_previous_kernel(PDL)
    slot, e = tl.program_id(1), tl.arange(0, BLOCK_E)
    expert, t = tile_of_group(route_ptr, slot, tl.program_id(0), e, T, E, BLOCK_T)
    if expert < E:
        r = tl.arange(0, BLOCK_ER)
        factor = factor_ptr + expert.to(tl.int64) * R * F
        u, _ = shrink_tile(rows_ptr, stride_t, factor, None, t, r, e, 0, F, T, F, R, E, ACC, PRECISION, BLOCK_F)
        let_next_kernel_start(PDL)
        row = t.to(tl.int64) * OUT_ROWS + (expert if BY_EXPERT else slot)
        mask = (t < T)[:, None] & (r < R)[None, :]
        tl.store(out_ptr + row[:, None] * R + r[None, :], (u * scaling).to(out_ptr.dtype.element_ty), mask=mask)
