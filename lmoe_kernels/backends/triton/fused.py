# SPDX-License-Identifier: Apache-2.0
"""Kernels that fuse stages: one pass from x to y; shrink with mix, forward and backward."""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.gates import gate_and_mix_bwd_tile, gates_of, mix_fwd_tile, router_logits
from lmoe_kernels.backends.triton.mix import Constants, MixTensors
from lmoe_kernels.backends.triton.plans import Tile
from lmoe_kernels.backends.triton.tiles import (
    expand_tile,
    let_next_kernel_start,
    load_rows,
    shrink_tile,
    store_rows,
    wait_for_previous_kernel,
    write_tile,
)
from lmoe_kernels.options import Factors


def one_pass_fwd(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    logits: Tensor | None,  # (T, E), written
    u: Tensor | None,  # (T, E, R), written; None where it is not saved and fits into y, next to v
    v: Tensor | None,  # (T, E, R), scratch; None where it fits into y
    y: Tensor,  # (T, O), written
    scaling: float,
    constants: Constants,
    tile: Tile,
) -> None:
    """All of the forward: logits, u, v, and y = base + scaling * v B."""
    (T, I), O = x.shape, y.shape[1]  # noqa: E741
    host.launch(
        _one_pass_fwd_kernel, (tile.tiles_of(T),),
        x, x.stride(0), factors.lora_a, factors.gate_weight, factors.gate_bias, factors.lora_b, factors.gate_logits,
        base, host.row_stride(base), logits, u, v, y, scaling, T, I, O, **constants, **host.dot_constants(x), tile=tile,
    )  # fmt: skip


def shrink_mix_fwd(
    x: Tensor,  # (T, I)
    factors: Factors,
    logits: Tensor | None,  # (T, E), written
    u: Tensor,  # (T, E, R) or (T, 1, R), written
    v: Tensor,  # (T, E, R), written
    constants: Constants,
    tile: Tile,
) -> None:
    """u = x A^T and the logits, then v by the mix."""
    T, I = x.shape  # noqa: E741
    host.launch(
        _shrink_mix_fwd_kernel, (tile.tiles_of(T),),
        x, x.stride(0), factors.lora_a, factors.gate_weight, factors.gate_bias, factors.gate_logits, logits, u, v, T, I,
        **constants, **host.dot_constants(x), tile=tile,
    )  # fmt: skip


def shrink_mix_bwd(
    dy: Tensor,  # (T, O)
    lora_b: Tensor,  # (E, R, O)
    dv: Tensor,  # scratch of T E R elements
    tensors: MixTensors,
    scaling: float,
    constants: Constants,
    tile: Tile,
) -> None:
    """dv = scaling * dy B^T, then du, dlogits and v by the mix's backward."""
    T, O = dy.shape  # noqa: E741
    logits, dlogits_in, u, du, dlogits, v = tensors
    host.launch(
        _shrink_mix_bwd_kernel, (tile.tiles_of(T),),
        dy, dy.stride(0), lora_b, logits, dlogits_in, u, dv, du, dlogits, v, scaling, T, O,
        **constants, **host.dot_constants(dy), tile=tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _one_pass_fwd_kernel(
    x_ptr, x_stride_t,  # (T, I)
    a_ptr,  # (E, R, I)
    gate_ptr,  # (E, I) or None
    gate_bias_ptr,  # (E) or None
    b_ptr,  # (E, R, O)
    gate_logits_ptr,  # (T, E), where gate is None
    base_ptr, base_stride_t,  # (T, O), (O), or None
    logits_ptr,  # (T, E), written; or None
    u_ptr,  # (T, E, R), written; or None: in y's memory
    v_ptr,  # (T, E, R), scratch; or None: in y's memory, as it must be where u is
    y_ptr,  # (T, O), written
    scaling,
    T,
    I,  # noqa: E741
    O,  # noqa: E741
    E: tl.constexpr,
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of tokens from x to y: x is read once, y is written once.

    Scratch that y has room for lies in the rows of y that this program writes at the end: the tile's v, and u before it if
    nothing is saved.
    """
    wait_for_previous_kernel(PDL)
    ER: tl.constexpr = E * R
    IN_Y: tl.constexpr = v_ptr is None  # pyright: ignore[reportAssignmentType]
    if IN_Y:
        first = tl.program_id(0).to(tl.int64) * BLOCK_T
        v_ptr = y_ptr + first * (O - ER)  # token t's row is t * ER elements further on
        if u_ptr is None:
            u_ptr = v_ptr
            v_ptr += tl.minimum(T - first, BLOCK_T) * ER
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    er, e = tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    u, logits = shrink_tile(x_ptr, x_stride_t, a_ptr, gate_ptr, t, er, e, 0, I, T, I, ER, E, ACC, PRECISION, BLOCK_F)
    let_next_kernel_start(PDL)
    store_rows(u, u_ptr, t, er, T, ER)
    logits = router_logits(logits, gate_bias_ptr, gate_logits_ptr, logits_ptr, t, e, T, E)
    gates = gates_of(logits, e, E, TOP_K, RENORMALIZE)
    tl.debug_barrier()  # every thread sees u
    mix_fwd_tile(u_ptr, v_ptr, gates, t, e, T, E, EXPERTS_OF_A, R, MIXING, BLOCK_R)
    tl.debug_barrier()  # and v
    v = load_rows(v_ptr, t, er, T, ER)
    if IN_Y:
        tl.debug_barrier()  # every thread has read v before y is written
    for start in range(0, O, BLOCK_F):
        o = start + tl.arange(0, BLOCK_F)
        delta = expand_tile(v, b_ptr, tl.zeros((BLOCK_T, BLOCK_F), ACC), er, o, O, ER, PRECISION)
        write_tile(delta * scaling, base_ptr, base_stride_t, y_ptr, t, o, T, O)


@triton.jit(do_not_specialize=["T"])
def _shrink_mix_fwd_kernel(
    x_ptr, x_stride_t,  # (T, I)
    a_ptr,  # (E, R, I) or (1, R, I)
    gate_ptr,  # (E, I) or None
    gate_bias_ptr,  # (E) or None
    gate_logits_ptr,  # (T, E), where gate is None
    logits_ptr,  # (T, E), written; or None
    u_ptr,  # (T, E, R) or (T, 1, R), written
    v_ptr,  # (T, E, R), written
    T,
    I,  # noqa: E741
    E: tl.constexpr,
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of tokens from x to v. Where E R exceeds a tile's columns, x is read again for each further tile of them."""
    wait_for_previous_kernel(PDL)
    ER: tl.constexpr = EXPERTS_OF_A * R
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    er, e = tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    u, logits = shrink_tile(x_ptr, x_stride_t, a_ptr, gate_ptr, t, er, e, 0, I, T, I, ER, E, ACC, PRECISION, BLOCK_F)
    store_rows(u, u_ptr, t, er, T, ER)
    logits = router_logits(logits, gate_bias_ptr, gate_logits_ptr, logits_ptr, t, e, T, E)
    gates = gates_of(logits, e, E, TOP_K, RENORMALIZE)
    for start in range(BLOCK_ER, ER, BLOCK_ER):
        more, _ = shrink_tile(x_ptr, x_stride_t, a_ptr, None, t, start + er, e, 0, I, T, I, ER, E, ACC, PRECISION, BLOCK_F)
        store_rows(more, u_ptr, t, start + er, T, ER)
    let_next_kernel_start(PDL)
    tl.debug_barrier()  # every thread sees u
    mix_fwd_tile(u_ptr, v_ptr, gates, t, e, T, E, EXPERTS_OF_A, R, MIXING, BLOCK_R)


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
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of tokens from dy to du, dlogits and v. Where E R exceeds a tile's columns, dy is read again for each tile."""
    wait_for_previous_kernel(PDL)
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    for start in range(0, E * R, BLOCK_ER):
        er = start + tl.arange(0, BLOCK_ER)
        dv, _ = shrink_tile(dy_ptr, stride_t, b_ptr, None, t, er, e, 0, O, T, O, E * R, E, ACC, PRECISION, BLOCK_F)
        store_rows(dv * scaling, dv_ptr, t, er, T, E * R)
    let_next_kernel_start(PDL)
    tl.debug_barrier()  # every thread sees dv
    gate_and_mix_bwd_tile(
        logits_ptr, dlogits_in_ptr, u_ptr, dv_ptr, du_ptr, dlogits_ptr, v_ptr,
        t, e, T, E, EXPERTS_OF_A, R, MIXING, TOP_K, RENORMALIZE, ACC, BLOCK_R,
    )  # fmt: skip
