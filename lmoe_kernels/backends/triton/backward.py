"""Backward of the `triton` backend: shrink of dy with the mix's backward, the weight gradients, and expand into dx.

    _shrink_mix_bwd_kernel    dy, B, u -> dv -> du, dlogits, v        few tokens: _shrink_fwd_kernel, _mix_bwd_kernel
    _wgrad_bwd_kernel         v, dy -> dB;  [du | dlogits], x -> dA, dgate_weight
    _reduce_bwd_kernel        the parts of a weight gradient, in their order
    _expand_fwd_kernel        [du | dlogits], [A | gate_weight] -> dx
    in groups                 see `grouped`: top_k of so many experts that it pays

Two kernels read dy, one behind the other, so that what the L2 holds of it comes from there the second time: all of it up to
some 4000 tokens of O = 4096 in bf16 (an H200 has 50 MB). x is read once. dx comes last, for the frozen product adds into it.

To read dy once beyond that would spare 2 O bytes a token, 8192. By count it pays nowhere (E R = 128, 132 processors):
- A kernel that makes both products of a slab of F features leaves dv in O / F parts, which cost 8 E R O / F bytes a token:
  32768 at F = 128. F = 512 breaks even, with dB's accumulators in all the registers of a processor. For E R <= 32 only.
- A kernel that goes over a tile of tokens twice keeps 132 tiles of 64 tokens in the L2, 66 MB, and adds each to a dB of
  2 MB in fp32: 65536 bytes a token.
- Chunks of T, shrink and wgrad by turns: 2048 tokens, 16 MB, stay in the L2 and are 32 tiles. To fill the chip the shrink
  splits O by four, 4096 bytes a token, and the wgrad the tokens, into sums that each chunk reads and writes: 8192. That is
  the L2's traffic, but for three launches more, by chunk, to spare the memory 4 us (at 4.3 TB/s).
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import configs, grouped
from lmoe_kernels.backends.triton.configs import BackwardPlan, Chip, GroupedPlan, ceil_div
from lmoe_kernels.backends.triton.forward import expand, mix_fwd, shrink
from lmoe_kernels.backends.triton.launch import (
    accumulator,
    chip_of,
    dot_constants,
    launch,
    mix_constants,
    on_device_of,
    sizes_of,
)
from lmoe_kernels.backends.triton.tiles import (
    load_rows,
    mix_bwd_tile,
    of_kept,
    shrink_tile,
    softmax_and_kept,
    softmax_bwd,
    store_rows,
    sum_splits,
)
from lmoe_kernels.options import Factors, Gradients, Options, Saved, Wanted


def backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I)
    factors: Factors,
    saved: Saved,
    options: Options,
    *,
    wanted: Wanted,
) -> Gradients:
    """The gradients that are wanted; see `lmoe_kernels.reference.backward` for the contract."""
    lora_a, lora_b, gate_weight, _, _ = factors
    logits, u = saved.router_logits(factors), saved.u
    scaling, mixing, top_k, renormalize = options
    output_mask = wanted.x, wanted.lora_a, wanted.lora_b, wanted.gate
    want_x, want_a, want_b, want_gate = output_mask
    sizes, chip = sizes_of(dy, lora_a, lora_b), chip_of(dy.device)
    plan, mix = configs.backward_plan(sizes, dy.dtype, chip), mix_constants(sizes, mixing, top_k, renormalize)
    groups = configs.grouped_plan(sizes, top_k, dy.dtype, chip)
    if groups is not None:
        with on_device_of(dy):
            grads = backward_in_groups(
                dy, dlogits_in, x, lora_a, lora_b, gate_weight, logits, u, scaling, output_mask, mix, plan, groups, chip
            )
            return _gradients(factors, *grads)
    du = torch.empty_like(u) if want_x or want_a else None
    v = dy.new_empty(sizes.T, sizes.E, sizes.R) if want_b else None
    dlogits = dy.new_empty(sizes.T, sizes.E, dtype=logits.dtype if gate_weight is None else dy.dtype)
    dx = dlora_a = dlora_b = dgate = None
    with on_device_of(dy):
        if du is not None or want_gate:
            shrink_mix(dy, lora_b.to(dy.dtype), logits, dlogits_in, u, du, dlogits, v, scaling, mix, plan)
        elif v is not None:
            mix_fwd(None, None, logits, None, u, v, mix, plan.mix)
        if v is not None:
            (dlora_b,) = wgrad(dy, [(v, lora_b)], scaling, chip)
        over_x = [] if du is None or not want_a else [(du, lora_a)]
        if want_gate and gate_weight is not None:
            over_x.append((dlogits, gate_weight))
        grads = wgrad(x, over_x, 1.0, chip) if over_x else []
        dlora_a = grads[0] if want_a else None
        if want_gate:
            dgate = dlogits if gate_weight is None else grads[-1]
        if want_x:
            dx, gate = dy.new_empty(sizes.T, sizes.I), None if gate_weight is None else gate_weight.to(dy.dtype)
            assert du is not None
            expand(du, lora_a.to(dy.dtype), None if gate is None else dlogits, gate, None, 1.0, dx, plan.expand)
    return _gradients(factors, dx, dlora_a, dlora_b, dgate)


def _gradients(factors: Factors, dx: Tensor | None, da: Tensor | None, db: Tensor | None, dgate: Tensor | None) -> Gradients:
    return Gradients(dx, da, db, None, None, dgate) if factors.gate_weight is None else Gradients(dx, da, db, dgate)


def backward_in_groups(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I)
    lora_a: Tensor,  # (E, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    logits: Tensor,  # (T, E)
    u: Tensor,  # (T, E, R)
    scaling: float,
    output_mask: tuple[bool, bool, bool, bool],
    mix: dict[str, int],
    plan: BackwardPlan,
    groups: GroupedPlan,
    chip: Chip,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`backward` by the tokens of each expert."""
    want_x, want_a, want_b, want_gate = output_mask
    (T, E, R), K = u.shape, mix["TOP_K"]
    dx = dlora_a = dlora_b = dgate = None
    route = grouped.route(None, logits, None, dy, mix, plan.mix)
    du = dy.new_empty(T, K, R) if want_x or want_a else None
    v = dy.new_empty(T, K, R) if want_b else None
    dlogits = dy.new_empty(T, E, dtype=logits.dtype if gate_weight is None else dy.dtype)
    if du is not None or want_gate:
        dv = dy.new_empty(T, K, R)
        grouped.shrink(dy, lora_b.to(dy.dtype), route, scaling, dv, False, groups.shrink)
        grouped.mix_bwd(u, dv, route, logits, dlogits_in, du, v, dlogits, mix, plan.mix)
    elif v is not None:
        grouped.mix_fwd(u, route, v, mix, plan.mix)
    if v is not None:
        dlora_b = grouped.wgrad(dy, v, lora_b, route, scaling, groups.wgrad)
    if want_a:
        assert x is not None
        assert du is not None
        dlora_a = grouped.wgrad(x, du, lora_a, route, 1.0, groups.wgrad)
    if want_gate:
        dgate = dlogits if gate_weight is None else wgrad(x, [(dlogits, gate_weight)], 1.0, chip)[0]
    if want_x:
        assert du is not None
        dx = dy.new_empty(T, lora_a.shape[2])
        if gate_weight is not None:
            expand(dlogits, gate_weight.to(dy.dtype)[:, None], None, None, None, 1.0, dx, groups.gate_expand)
        grouped.expand(du, lora_a.to(dy.dtype), route, None if gate_weight is None else dx, 1.0, dx, groups.expand)
    return dx, dlora_a, dlora_b, dgate


def shrink_mix(
    dy: Tensor,  # (T, O)
    lora_b: Tensor,  # (E, R, O), dy's dtype
    logits: Tensor,  # (T, E)
    dlogits_in: Tensor | None,  # (T, E)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    du: Tensor | None,  # shaped as u, written
    dlogits: Tensor,  # (T, E), written
    v: Tensor | None,  # (T, E, R), written
    scaling: float,
    mix: dict[str, int],
    plan: BackwardPlan,
) -> None:
    """dv = scaling * dy B^T, and from it the gradients of the mix; dv itself is scratch."""
    (T, O), dot = dy.shape, dot_constants(dy)  # noqa: E741
    dv = dy.new_empty(T, *lora_b.shape[:2])
    if plan.splits == 1:
        launch(
            _shrink_mix_bwd_kernel, (plan.shrink.tiles_of(T),),
            dy, dy.stride(0), lora_b, logits, dlogits_in, u, dv, du, dlogits, v, scaling, T, O, **mix, **dot,
            tile=plan.shrink,
        )  # fmt: skip
    else:
        parts, _ = shrink(dy, lora_b, None, plan.splits, plan.shrink)
        launch(
            _mix_bwd_kernel, (plan.mix.tiles_of(T),),
            parts, logits, dlogits_in, u, dv, du, dlogits, v, scaling, T, SPLITS=plan.splits, ACC=dot["ACC"], **mix,
            tile=plan.mix,
        )  # fmt: skip


def wgrad(
    rows: Tensor | None,  # (T, F)
    pairs: list[tuple[Tensor, Tensor]],  # coefficients (T, ...) and their parameter (..., F)
    scaling: float,
    chip: Chip,
) -> list[Tensor]:
    """scaling * coefficients^T rows for each pair, in its parameter's dtype out of the accumulators.

    A second pair, the gate's, shares the reading of the rows where both fit one tile.
    """
    assert rows is not None
    (T, F), heights = rows.shape, tuple(parameter.shape[:-1].numel() for _, parameter in pairs)
    plan = configs.wgrad_plan(T, F, heights, rows.dtype, chip)
    if len(pairs) == 2 and (heights[0] > plan.tile.ER or heights[1] > plan.tile.E):
        return wgrad(rows, pairs[:1], scaling, chip) + wgrad(rows, pairs[1:], scaling, chip)
    grads = [rows.new_empty(parameter.shape, dtype=parameter.dtype) for _, parameter in pairs]
    parts = grads
    if plan.splits > 1:
        parts = [rows.new_empty(plan.splits, *grad.shape, dtype=accumulator(rows)) for grad in grads]
    beside = (pairs[1][0], parts[1]) if len(pairs) == 2 else (None, None)
    launch(
        _wgrad_bwd_kernel, (ceil_div(F, plan.tile.F), ceil_div(heights[0], plan.tile.ER), plan.splits),
        rows, rows.stride(0), pairs[0][0], beside[0], parts[0], beside[1], scaling, T, F, plan.tokens,
        ER=heights[0], E=heights[-1], **dot_constants(rows), tile=plan.tile,
    )  # fmt: skip
    if plan.splits > 1:
        for part, grad in zip(parts, grads, strict=True):
            launch(
                _reduce_bwd_kernel, (ceil_div(grad.numel(), configs.REDUCE.F),),
                part, grad, grad.numel(), plan.splits, tile=configs.REDUCE,
            )  # fmt: skip
    return grads


@triton.jit(do_not_specialize=["T"])
def _shrink_mix_bwd_kernel(
    dy_ptr, stride_t,  # (T, O)
    b_ptr,  # (E, R, O)
    logits_ptr,  # (T, E)
    dlogits_in_ptr,  # (T, E) or None
    u_ptr,  # (T, E, R) or (T, 1, R)
    dv_ptr,  # (T, E, R), scratch
    du_ptr,  # shaped as u, written; or None
    dlogits_ptr,  # (T, E), written
    v_ptr,  # (T, E, R), written; or None
    scaling,
    T,
    O,  # noqa: E741
    E: tl.constexpr,
    E_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIX: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of tokens from dy to du, dlogits and v. Where E R needs several tiles of columns, dy is read again for each."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    for start in range(0, E * R, BLOCK_ER):
        er = start + tl.arange(0, BLOCK_ER)
        dv, _ = shrink_tile(dy_ptr, stride_t, b_ptr, None, t, er, e, 0, O, T, O, E * R, E, ACC, PRECISION, BLOCK_F)
        store_rows(dv * scaling, dv_ptr, t, er, T, E * R)
    tl.debug_barrier()  # every thread sees dv
    _mix_bwd(
        logits_ptr, dlogits_in_ptr, u_ptr, dv_ptr, du_ptr, dlogits_ptr, v_ptr,
        t, e, T, E, E_OF_A, R, MIX, TOP_K, RENORMALIZE, ACC, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _mix_bwd_kernel(
    dv_parts_ptr,  # (SPLITS, T, E R)
    logits_ptr,  # (T, E)
    dlogits_in_ptr,  # (T, E) or None
    u_ptr,  # (T, E, R) or (T, 1, R)
    dv_ptr,  # (T, E, R), scratch
    du_ptr,  # shaped as u, written; or None
    dlogits_ptr,  # (T, E), written
    v_ptr,  # (T, E, R), written; or None
    scaling,
    T,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    E_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIX: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the splits of a tile of tokens in their order, then the mix's backward."""
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    for start in range(0, E * R, BLOCK_ER):
        er = start + tl.arange(0, BLOCK_ER)
        dv = sum_splits(dv_parts_ptr, t, er, T, E * R, SPLITS)
        store_rows(dv * scaling, dv_ptr, t, er, T, E * R)
    tl.debug_barrier()  # every thread sees dv
    _mix_bwd(
        logits_ptr, dlogits_in_ptr, u_ptr, dv_ptr, du_ptr, dlogits_ptr, v_ptr,
        t, e, T, E, E_OF_A, R, MIX, TOP_K, RENORMALIZE, ACC, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _mix_bwd(
    logits_ptr,  # (T, E)
    dlogits_in_ptr,  # (T, E) or None
    u_ptr,  # (T, E, R) or (T, 1, R)
    dv_ptr,  # (T, E, R)
    du_ptr,  # shaped as u, written; or None
    dlogits_ptr,  # (T, E), written
    v_ptr,  # (T, E, R), written; or None
    t,  # (BLOCK_T) tokens
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    E_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIX: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What follows the shrink of dy: gates again from the logits, the mix's backward, the logits' gradient."""
    softmax, kept = softmax_and_kept(load_rows(logits_ptr, t, e, T, E).to(ACC), e, E, TOP_K, RENORMALIZE)
    gates = of_kept(softmax, kept, RENORMALIZE)
    dgates = mix_bwd_tile(u_ptr, dv_ptr, du_ptr, v_ptr, gates, t, e, T, E, E_OF_A, R, MIX, BLOCK_R)
    dlogits = softmax_bwd(softmax, of_kept(dgates, kept, RENORMALIZE))
    if dlogits_in_ptr is not None:
        dlogits += load_rows(dlogits_in_ptr, t, e, T, E).to(ACC)
    store_rows(dlogits, dlogits_ptr, t, e, T, E)


@triton.jit(do_not_specialize=["T", "tokens_of_split"])
def _wgrad_bwd_kernel(
    rows_ptr, stride_t,  # (T, F)
    coefficients_ptr,  # (T, ER)
    beside_ptr,  # (T, E), a second set of coefficients over the same rows; or None
    parts_ptr,  # (SPLITS, ER, F), written
    beside_parts_ptr,  # (SPLITS, E, F), written; None where beside is
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
):  # fmt: skip
    """Some features of scaling * coefficients^T rows, summed over the tokens of one split."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    er, e = tl.program_id(1) * BLOCK_ER + tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    t_from = split * tokens_of_split
    t_to = tl.minimum(T, t_from + tokens_of_split)
    acc = tl.zeros((BLOCK_F, BLOCK_ER), ACC)
    acc_beside = tl.zeros((BLOCK_F, BLOCK_E), ACC)
    for start in range(t_from, t_to, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        rows = rows_ptr + t.to(tl.int64)[:, None] * stride_t + f[None, :]
        x = tl.trans(tl.load(rows, mask=(t < t_to)[:, None] & (f < F)[None, :], other=0.0))
        # [BLOCK_F, BLOCK_T] @ [BLOCK_T, BLOCK_ER] -> [BLOCK_F, BLOCK_ER]
        acc = tl.dot(x, load_rows(coefficients_ptr, t, er, t_to, ER), acc, input_precision=PRECISION, out_dtype=ACC)
        if beside_ptr is not None:
            # [BLOCK_F, BLOCK_T] @ [BLOCK_T, BLOCK_E] -> [BLOCK_F, BLOCK_E]
            c = load_rows(beside_ptr, t, e, t_to, E)
            acc_beside = tl.dot(x, c, acc_beside, input_precision=PRECISION, out_dtype=ACC)
    first_row = split.to(tl.int64) * ER
    _store_transposed(acc * scaling, parts_ptr, first_row, er, f, ER, F)
    if beside_ptr is not None:
        _store_transposed(acc_beside * scaling, beside_parts_ptr, split.to(tl.int64) * E, e, f, E, F)


@triton.jit
def _store_transposed(
    tile,  # (BLOCK_F, BLOCK_C)
    out_ptr,  # (rows, F), written
    first_row,
    c,  # (BLOCK_C) rows behind the first
    f,  # (BLOCK_F) features
    C: tl.constexpr,
    F,
):
    """out[first_row + c, f] = tile^T."""
    at = out_ptr + (first_row + c)[None, :] * F + f[:, None]
    tl.store(at, tile.to(out_ptr.dtype.element_ty), mask=(c < C)[None, :] & (f < F)[:, None])


@triton.jit(do_not_specialize=["splits"])
def _reduce_bwd_kernel(
    parts_ptr,  # (splits, size)
    out_ptr,  # (size), written
    size,
    splits,
    BLOCK_F: tl.constexpr,
):
    """The sum of the splits in their order, in the dtype of the result."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.load(parts_ptr + at, mask=at < size, other=0.0)
    for split in range(1, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)
