# SPDX-License-Identifier: Apache-2.0
"""Wgrad: the gradient of a factor, coefficients^T rows, summed over the tokens. For B: v and dy; for A: du and x.

`wgrad_bwd` can make the gradient of gate_weight from the same rows, and splits the tokens (split-K) where the factor alone
makes too few programs. `grouped_wgrad_bwd` sums over each expert's own tokens.

Both load a tile of rows as the product takes it, features by tokens. `tl.trans` after the load would keep the tile out of
Triton's asynchronous copies on all chips whose products take operands from registers: for sm_80 a step then has 357
instructions instead of 266, and a thread 188 registers instead of 128 (E R = 128 and the gate, Triton 3.7.1, 2026-11-26).
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.cost import ceil_div
from lmoe_kernels.backends.triton.plans import Chip, Tile
from lmoe_kernels.backends.triton.route import parts_of_slot
from lmoe_kernels.backends.triton.tiles import let_next_kernel_start, load_rows, wait_for_previous_kernel


def wgrad_bwd(
    rows: Tensor,  # (T, F)
    pairs: list[tuple[Tensor, Tensor]],  # coefficients (T, ...) and their parameter (..., F); as a second pair the gate's
    chip: Chip,
    *,
    scaling: float = 1.0,
) -> list[Tensor]:
    """scaling * coefficients^T rows for each pair, rounded once to its parameter's dtype.

    One kernel makes both gradients and loads the rows once where both fit its tile; else each pair has its own launch.
    """
    T, F = rows.shape
    if T == 0 or F == 0:  # the kernel relies on having tokens, `heights` on having features
        return [rows.new_zeros(parameter.shape, dtype=parameter.dtype) for _, parameter in pairs]
    heights = tuple([parameter.numel() // F for _, parameter in pairs])
    plan = configs.wgrad_plan(T, F, heights, rows.dtype, chip)
    if len(pairs) == 2 and (heights[0] > plan.tile.ER or heights[1] > plan.tile.E):
        return wgrad_bwd(rows, pairs[:1], chip, scaling=scaling) + wgrad_bwd(rows, pairs[1:], chip, scaling=scaling)
    # `empty_like` takes 0.9 us, `new_empty` with a shape and a dtype 2.4 (Intel Xeon, 2026-11)
    parts = grads = [torch.empty_like(parameter) for _, parameter in pairs]
    if plan.splits > 1:
        parts = [rows.new_empty(plan.splits, *grad.shape, dtype=host.accumulator(rows)) for grad in grads]
    gate_coefficients, gate_parts = (pairs[1][0], parts[1]) if len(pairs) == 2 else (None, None)
    host.launch(
        _wgrad_bwd_kernel, (ceil_div(F, plan.tile.F), ceil_div(heights[0], plan.tile.ER), plan.splits),
        rows, rows.stride(0), pairs[0][0], gate_coefficients, parts[0], gate_parts, scaling, T, F, plan.tokens,
        ER=heights[0], E=heights[-1], **host.dot_constants(rows), tile=plan.tile,
    )  # fmt: skip
    if plan.splits > 1:
        for part, grad in zip(parts, grads, strict=True):
            host.launch(
                _reduce_bwd_kernel, (ceil_div(grad.numel(), configs.REDUCE_TILE.F),),
                part, grad, grad.numel(), plan.splits, tile=configs.REDUCE_TILE,
            )  # fmt: skip
    return grads


def grouped_wgrad_bwd(
    rows: Tensor,  # (T, F)
    coefficients: Tensor,  # (T, K, R)
    parameter: Tensor,  # (E, R, F)
    route: Tensor,  # (K, 2 T + E + 1)
    tile: Tile,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """For each expert, scaling * the sum over its tokens of coefficients[t, slot]^T rows[t], in the parameter's dtype."""
    E, R, F = parameter.shape
    grad = torch.empty_like(parameter)
    host.launch(
        _grouped_wgrad_bwd_kernel, (ceil_div(F, tile.F), E),
        rows, rows.stride(0), coefficients, route, grad, scaling, rows.shape[0], F,
        E=E, R=R, TOP_K=route.shape[0], **host.dot_constants(rows), tile=tile,
    )  # fmt: skip
    return grad


@triton.jit(do_not_specialize=["T", "tokens_of_split"])
def _wgrad_bwd_kernel(
    rows_ptr, stride_t,  # (T, F)
    coefficients_ptr,  # (T, ER)
    gate_coefficients_ptr,  # (T, E), a second set of coefficients for the same rows; or None
    parts_ptr,  # (SPLITS, ER, F), written
    gate_parts_ptr,  # (SPLITS, E, F), written; None where gate_coefficients is
    scaling,
    T,
    F,
    tokens_of_split,
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
    """The partial sum of scaling * coefficients^T rows over one split of the tokens, for some features."""
    wait_for_previous_kernel(PDL)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    er, e = tl.program_id(1) * BLOCK_ER + tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    t_from = split * tokens_of_split
    t_to = tl.minimum(T, t_from + tokens_of_split)
    if rows_ptr.dtype.element_ty.primitive_bitwidth == 16:  # in fp32 it takes registers: 80 become 164 on sm_80 (2026-11-26)
        tl.assume(t_to > t_from)  # else Triton 3.6 and its ptxas serialise wgmma (warning C7515)
    acc = tl.zeros((BLOCK_F, BLOCK_ER), ACC)
    gate_acc = tl.zeros((BLOCK_F, BLOCK_E), ACC)
    for start in range(t_from, t_to, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = rows_ptr + t.to(tl.int64)[None, :] * stride_t + f[:, None]
        x = tl.load(rows, mask=(f < F)[:, None] & (t < t_to)[None, :], other=0.0)
        # All tiles are loaded before the first product. With the gate's coefficients loaded after it, Triton kept both tiles
        # of coefficients at one address, and for ER=27 and E=3 on sm_90 ptxas 12.8 left out instructions that compute the
        # descriptors of the gate's: an H200 gave a wrong gradient of gate_weight (2026-11-26).
        c = load_rows(coefficients_ptr, t, er, t_to, ER)
        if gate_coefficients_ptr is not None:
            gate_c = load_rows(gate_coefficients_ptr, t, e, t_to, E)
            # [BLOCK_F, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_F, BLOCK_E]
            gate_acc = tl.dot(x, gate_c, gate_acc, input_precision=PRECISION, out_dtype=ACC)
        # [BLOCK_F, BLOCK_T] @ [BLOCK_T, BLOCK_ER] -> [BLOCK_F, BLOCK_ER]
        acc = tl.dot(x, c, acc, input_precision=PRECISION, out_dtype=ACC)
    let_next_kernel_start(PDL)
    first_row = split.to(tl.int64) * ER
    _store_transposed(acc * scaling, parts_ptr, first_row, er, f, ER, F)
    if gate_coefficients_ptr is not None:
        _store_transposed(gate_acc * scaling, gate_parts_ptr, split.to(tl.int64) * E, e, f, E, F)


@triton.jit
def _store_transposed(
    tile,  # (BLOCK_F, BLOCK_C)
    out_ptr,  # (rows, F), written
    first_row,
    c,  # (BLOCK_C) rows, counted from first_row
    f,  # (BLOCK_F) features
    C: tl.constexpr,
    F,
):
    """out[first_row + c, f] = tile^T."""
    at = out_ptr + (first_row + c)[None, :] * F + f[:, None]
    tl.store(at, tile.to(out_ptr.dtype.element_ty), mask=(c < C)[None, :] & (f < F)[:, None])


@triton.jit(do_not_specialize=["splits"])
def _reduce_bwd_kernel(
    parts_ptr,  # (splits, size), partial sums
    out_ptr,  # (size), written
    size,
    splits,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    """The partial sums added up in their order, in the dtype of the result."""
    wait_for_previous_kernel(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.load(parts_ptr + at, mask=at < size, other=0.0)
    for split in range(1, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * size + at, mask=at < size, other=0.0)
    let_next_kernel_start(PDL)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["T"])
def _grouped_wgrad_bwd_kernel(
    rows_ptr, stride_t,  # (T, F)
    coefficients_ptr,  # (T, K, R)
    route_ptr,  # (K, 2 T + E + 1)
    out_ptr,  # (E, R, F), written
    scaling,
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
    PDL: tl.constexpr,
):  # fmt: skip
    """Some features of one expert's gradient, summed over its tokens slot by slot, in their order."""
    wait_for_previous_kernel(PDL)
    f, r = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_ER)
    expert = tl.program_id(1)
    acc = tl.zeros((BLOCK_F, BLOCK_ER), ACC)
    for slot in range(TOP_K):
        _, order, bounds = parts_of_slot(route_ptr, slot, T, E)
        begin, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
        for start in range(begin, end, BLOCK_T):
            at = start + tl.arange(0, BLOCK_T)
            t = tl.load(order + at, mask=at < end, other=0).to(tl.int64)
            x = tl.load(
                rows_ptr + t[None, :] * stride_t + f[:, None], mask=(f < F)[:, None] & (at < end)[None, :], other=0.0
            )
            row = t * TOP_K + slot
            mask = (at < end)[:, None] & (r < R)[None, :]
            c = tl.load(coefficients_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0)
            # [BLOCK_F, BLOCK_T] @ [BLOCK_T, BLOCK_ER] -> [BLOCK_F, BLOCK_ER]
            acc = tl.dot(x, c, acc, input_precision=PRECISION, out_dtype=ACC)
    let_next_kernel_start(PDL)
    at = out_ptr + (expert.to(tl.int64) * R + r)[None, :] * F + f[:, None]
    tl.store(at, (acc * scaling).to(out_ptr.dtype.element_ty), mask=(r < R)[None, :] & (f < F)[:, None])
