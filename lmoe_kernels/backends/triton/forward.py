"""Forward of the `triton` backend: in one pass over the tokens, or in stages where that would leave most of the chip idle.

one pass    _one_pass_fwd_kernel                                          E * R fits one tile and T fills the chip
two         _shrink_mix_fwd_kernel, _expand_fwd_kernel                    larger E * R, or half the chip
three       _shrink_fwd_kernel, _mix_fwd_kernel, _expand_fwd_kernel       few tokens, or long fp32 sums: I is split
in groups   see `grouped`                                                 top_k of so many experts that it pays
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import configs, grouped
from lmoe_kernels.backends.triton.configs import ForwardPlan, GroupedPlan, Tile, ceil_div
from lmoe_kernels.backends.triton.launch import (
    accumulator,
    chip_of,
    dot_constants,
    launch,
    mix_constants,
    on_device_of,
    row_stride,
    sizes_of,
)
from lmoe_kernels.backends.triton.tiles import (
    expand_tile,
    gates_of,
    load_rows,
    mix_fwd_tile,
    shrink_tile,
    store_rows,
    sum_splits,
    write_tile,
)
from lmoe_kernels.options import Factors, Options, Saved


def forward(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """The delta, added to `base`; see `lmoe_kernels.reference.forward` for the contract."""
    lora_a, lora_b, gate_weight, _, gate_logits = factors
    scaling, mixing, top_k, renormalize = options
    sizes = sizes_of(x, lora_a, lora_b)
    plan = configs.forward_plan(sizes, x.dtype, chip_of(x.device))
    groups = configs.grouped_plan(sizes, top_k, x.dtype, chip_of(x.device))
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    gate = None if gate_weight is None else gate_weight.to(x.dtype)
    y = x.new_empty(sizes.T, sizes.O)
    logits = x.new_empty(sizes.T, sizes.E, dtype=accumulator(x)) if gate is not None and save else None
    mix, dot = mix_constants(sizes, mixing, top_k, renormalize), dot_constants(x)
    with on_device_of(x):
        if groups is not None:
            u = forward_in_groups(x, a, b, gate, gate_logits, base, scaling, logits, y, mix, plan, groups)
            return y, Saved(logits, u) if save else None
        u, v = x.new_empty(sizes.T, sizes.E_of_a, sizes.R), x.new_empty(sizes.T, sizes.E, sizes.R)
        if plan.one_pass is not None:
            launch(
                _one_pass_fwd_kernel, (plan.one_pass.tiles_of(sizes.T),),
                x, x.stride(0), a, gate, b, gate_logits, base, row_stride(base), logits, u, v, y,
                scaling, sizes.T, sizes.I, sizes.O, **mix, **dot, tile=plan.one_pass,
            )  # fmt: skip
        else:
            if plan.splits == 1:
                launch(
                    _shrink_mix_fwd_kernel, (plan.shrink.tiles_of(sizes.T),),
                    x, x.stride(0), a, gate, gate_logits, logits, u, v,
                    sizes.T, sizes.I, **mix, **dot, tile=plan.shrink,
                )  # fmt: skip
            else:
                u_parts, logit_parts = shrink(x, a, gate, plan.splits, plan.shrink)
                mix_fwd(u_parts, logit_parts, gate_logits, logits, u, v, mix, plan.mix)
            expand(v, b, None, None, base, scaling, y, plan.expand)
    return y, Saved(logits, u) if save else None


def forward_in_groups(
    x: Tensor,  # (T, I)
    lora_a: Tensor,  # (E, R, I), x's dtype
    lora_b: Tensor,  # (E, R, O), x's dtype
    gate_weight: Tensor | None,  # (E, I), x's dtype
    gate_logits: Tensor | None,  # (T, E)
    base: Tensor | None,  # (O) or (T, O)
    scaling: float,
    logits: Tensor | None,  # (T, E), written
    y: Tensor,  # (T, O), written
    mix: dict[str, int],
    plan: ForwardPlan,
    groups: GroupedPlan,
) -> Tensor:
    """y by the tokens of each expert; returns u (T, E, R), unwritten where a token does not keep the expert.

    `u` has its full shape because what torch.compile traces cannot know of this plan; zeros would cost 2 E R bytes a token,
    4096 at E = 128 and R = 16, a twelfth of all the traffic at I = O = 4096 and k = 2. The backward reads the experts kept.
    """
    parts = None
    if gate_weight is not None:
        parts, _ = shrink(x, gate_weight[:, None], None, plan.splits, groups.gate)
    route = grouped.route(parts, gate_logits, logits, x, mix, plan.mix)
    u = x.new_empty(x.shape[0], mix["E"], mix["R"])
    v = x.new_empty(x.shape[0], mix["TOP_K"], mix["R"])
    grouped.shrink(x, lora_a, route, 1.0, u, True, groups.shrink)
    grouped.mix_fwd(u, route, v, mix, plan.mix)
    grouped.expand(v, lora_b, route, base, scaling, y, groups.expand)
    return u


def shrink(
    rows: Tensor,  # (T, F)
    factor: Tensor,  # (E, R, F)
    gate: Tensor | None,  # (E, F)
    splits: int,
    tile: Tile,
) -> tuple[Tensor, Tensor | None]:
    """rows factor^T and rows gate^T in partial sums: (splits, T, E R) and (splits, T, E)."""
    T, F = rows.shape
    ER, E = factor.shape[0] * factor.shape[1], 1 if gate is None else gate.shape[0]
    parts = rows.new_empty(splits, T, ER, dtype=accumulator(rows))
    gate_parts = None if gate is None else rows.new_empty(splits, T, E, dtype=accumulator(rows))
    features_of_split = ceil_div(F, splits * tile.F) * tile.F
    launch(
        _shrink_fwd_kernel, (tile.tiles_of(T), ceil_div(ER, tile.ER), splits),
        rows, rows.stride(0), factor, gate, parts, gate_parts, T, F, features_of_split,
        ER=ER, E=E, **dot_constants(rows), tile=tile,
    )  # fmt: skip
    return parts, gate_parts


def mix_fwd(
    u_parts: Tensor | None,  # (SPLITS, T, E R); None: u is there already
    logit_parts: Tensor | None,  # (SPLITS, T, E); None: the logits are given
    gate_logits: Tensor | None,  # (T, E)
    logits: Tensor | None,  # (T, E), written
    u: Tensor,  # (T, E, R) or (T, 1, R), written where u_parts are given
    v: Tensor,  # (T, E, R), written
    mix: dict[str, int],
    tile: Tile,
) -> None:
    """Sum the splits and blend the experts of every token."""
    launch(
        _mix_fwd_kernel, (tile.tiles_of(u.shape[0]),),
        u_parts, logit_parts, gate_logits, logits, u, v, u.shape[0],
        SPLITS=1 if u_parts is None else u_parts.shape[0], ACC=dot_constants(u)["ACC"], **mix, tile=tile,
    )  # fmt: skip


def expand(
    v: Tensor,  # (T, E, R)
    factor: Tensor,  # (E, R, F)
    dlogits: Tensor | None,  # (T, E), the backward's second pair
    gate: Tensor | None,  # (E, F)
    base: Tensor | None,  # (F) or (T, F)
    scaling: float,
    out: Tensor,  # (T, F), written
    tile: Tile,
) -> None:
    """out = base + scaling * (v factor + dlogits gate)."""
    T, F = out.shape
    E = 1 if gate is None else gate.shape[0]
    launch(
        _expand_fwd_kernel, (tile.tiles_of(T), ceil_div(F, tile.F)),
        v, factor, dlogits, gate, base, row_stride(base), out, scaling, T, F,
        ER=factor.shape[0] * factor.shape[1], E=E, **dot_constants(v), tile=tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _one_pass_fwd_kernel(
    x_ptr, x_stride_t,  # (T, I)
    a_ptr,  # (E, R, I) or (1, R, I)
    gate_ptr,  # (E, I) or None
    b_ptr,  # (E, R, O)
    gate_logits_ptr,  # (T, E), where gate is None
    base_ptr, base_stride_t,  # (T, O), (O), or None
    logits_ptr,  # (T, E), written; or None
    u_ptr,  # (T, E, R) or (T, 1, R), written
    v_ptr,  # (T, E, R), written
    y_ptr,  # (T, O), written
    scaling,
    T,
    I,  # noqa: E741
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
    """A tile of tokens from x to y: x is read once, y is written once."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    er, e = tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    u, logits = shrink_tile(x_ptr, x_stride_t, a_ptr, gate_ptr, t, er, e, 0, I, T, I, E_OF_A * R, E, ACC, PRECISION, BLOCK_F)
    store_rows(u, u_ptr, t, er, T, E_OF_A * R)
    gates = gates_of(logits, gate_logits_ptr, logits_ptr, t, e, T, E, TOP_K, RENORMALIZE)
    tl.debug_barrier()  # every thread sees u
    mix_fwd_tile(u_ptr, v_ptr, gates, t, e, T, E, E_OF_A, R, MIX, BLOCK_R)
    tl.debug_barrier()  # and v
    v = load_rows(v_ptr, t, er, T, E * R)
    for start in range(0, O, BLOCK_F):
        o = start + tl.arange(0, BLOCK_F)
        delta = expand_tile(v, b_ptr, tl.zeros((BLOCK_T, BLOCK_F), ACC), er, o, O, E * R, PRECISION)
        write_tile(delta * scaling, base_ptr, base_stride_t, y_ptr, t, o, T, O)


@triton.jit(do_not_specialize=["T"])
def _shrink_mix_fwd_kernel(
    x_ptr, x_stride_t,  # (T, I)
    a_ptr,  # (E, R, I) or (1, R, I)
    gate_ptr,  # (E, I) or None
    gate_logits_ptr,  # (T, E), where gate is None
    logits_ptr,  # (T, E), written; or None
    u_ptr,  # (T, E, R) or (T, 1, R), written
    v_ptr,  # (T, E, R), written
    T,
    I,  # noqa: E741
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
    """A tile of tokens from x to v. Where E R needs several tiles of columns, x is read again for each."""
    ER: tl.constexpr = E_OF_A * R
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    er, e = tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    u, logits = shrink_tile(x_ptr, x_stride_t, a_ptr, gate_ptr, t, er, e, 0, I, T, I, ER, E, ACC, PRECISION, BLOCK_F)
    store_rows(u, u_ptr, t, er, T, ER)
    gates = gates_of(logits, gate_logits_ptr, logits_ptr, t, e, T, E, TOP_K, RENORMALIZE)
    for start in range(BLOCK_ER, ER, BLOCK_ER):
        more, _ = shrink_tile(x_ptr, x_stride_t, a_ptr, None, t, start + er, e, 0, I, T, I, ER, E, ACC, PRECISION, BLOCK_F)
        store_rows(more, u_ptr, t, start + er, T, ER)
    tl.debug_barrier()  # every thread sees u
    mix_fwd_tile(u_ptr, v_ptr, gates, t, e, T, E, E_OF_A, R, MIX, BLOCK_R)


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
):  # fmt: skip
    """One tile of tokens, some columns and a part of the features: a partial sum, for `_mix_*_kernel` to finish in order."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    er, e = tl.program_id(1) * BLOCK_ER + tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    f_from = split * features_of_split
    f_to = tl.minimum(F, f_from + features_of_split)
    part, gate_part = shrink_tile(
        rows_ptr, stride_t, factor_ptr, gate_ptr, t, er, e, f_from, f_to, T, F, ER, E, ACC, PRECISION, BLOCK_F
    )
    first_token = split.to(tl.int64) * T
    store_rows(part, parts_ptr + first_token * ER, t, er, T, ER)
    if gate_ptr is not None and tl.program_id(1) == 0:
        store_rows(gate_part, gate_parts_ptr + first_token * E, t, e, T, E)


@triton.jit(do_not_specialize=["T"])
def _mix_fwd_kernel(
    u_parts_ptr,  # (SPLITS, T, ER); None: u is there already
    logit_parts_ptr,  # (SPLITS, T, E); None: the logits are given
    gate_logits_ptr,  # (T, E), where logit_parts is None
    logits_ptr,  # (T, E), written; or None
    u_ptr,  # (T, E, R) or (T, 1, R), written where u_parts is given
    v_ptr,  # (T, E, R), written
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
    """Sum the splits of a tile of tokens in their order, then mix."""
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    if u_parts_ptr is not None:
        for start in range(0, E_OF_A * R, BLOCK_ER):
            er = start + tl.arange(0, BLOCK_ER)
            store_rows(sum_splits(u_parts_ptr, t, er, T, E_OF_A * R, SPLITS), u_ptr, t, er, T, E_OF_A * R)
        tl.debug_barrier()  # every thread sees u
    logits = tl.zeros((BLOCK_T, BLOCK_E), ACC)
    if logit_parts_ptr is not None:
        logits = sum_splits(logit_parts_ptr, t, e, T, E, SPLITS)
    gates = gates_of(logits, gate_logits_ptr, logits_ptr, t, e, T, E, TOP_K, RENORMALIZE)
    mix_fwd_tile(u_ptr, v_ptr, gates, t, e, T, E, E_OF_A, R, MIX, BLOCK_R)


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
