# SPDX-License-Identifier: Apache-2.0
"""Mix: blend the experts of every token by its gates, u to v; in the backward dv to du and dlogits.

`mix_fwd` and `mix_bwd` also add up the partial sums of a split-K shrink. The grouped ones work on the slots of a route: v,
dv and du are then (T, K, R), of the experts that each token keeps.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.configs import cached_plan
from lmoe_kernels.backends.triton.gates import (
    gate_and_mix_bwd_tile,
    gate_column,
    gates_of,
    mix_fwd_tile,
    router_logits,
    softmax_among,
    softmax_bwd,
)
from lmoe_kernels.backends.triton.plans import Tile
from lmoe_kernels.backends.triton.route import parts_of_slot
from lmoe_kernels.backends.triton.tiles import (
    let_next_kernel_start,
    load_rows,
    store_rows,
    sum_splits,
    wait_for_previous_kernel,
)
from lmoe_kernels.options import Options, Sizes

Constants = dict[str, Any]


@cached_plan
def gate_constants(sizes: Sizes, options: Options) -> Constants:
    """The constants of the kernels that have gates: sizes, which experts are kept, and what a gate multiplies."""
    sum_to_one = options.gates_sum_to_one(sizes.E)
    mixing = "blended" if options.averages_factors else "per expert"
    if sizes.experts_of_a < sizes.E and (sum_to_one or mixing == "per expert"):
        mixing = "shared a"
    return {
        "E": sizes.E, "EXPERTS_OF_A": sizes.experts_of_a, "R": sizes.R, "MIXING": mixing,
        "TOP_K": options.kept(sizes.E) if options.softmax else 0, "RENORMALIZE": sum_to_one,
    }  # fmt: skip


class MixTensors(NamedTuple):
    """The tensors of the mix's backward except dv. C is E, or K where tokens are grouped by expert."""

    logits: Tensor  # (T, E)
    dlogits_in: Tensor | None  # (T, E), the gradient that arrives at the returned router logits
    u: Tensor  # (T, E, R) or (T, 1, R)
    du: Tensor | None  # (T, C, R) or (T, 1, R), written; None where not needed
    dlogits: Tensor  # (T, E), written
    v: Tensor | None  # (T, C, R), written; None where not needed


def mix_fwd(
    u: Tensor,  # (T, E, R) or (T, 1, R), written where u_parts is given
    v: Tensor,  # (T, E, R), written
    constants: Constants,
    tile: Tile,
    *,
    u_parts: Tensor | None = None,  # (splits, T, E R); None: u is complete
    logit_parts: Tensor | None = None,  # (splits, T, E); None: gate_logits are given
    gate_bias: Tensor | None = None,  # (E)
    gate_logits: Tensor | None = None,  # (T, E)
    logits: Tensor | None = None,  # (T, E), written
) -> None:
    """Add up the partial sums and blend the experts of every token."""
    T = v.shape[0]
    host.launch(
        _mix_fwd_kernel, (tile.tiles_of(T),),
        u_parts, logit_parts, gate_bias, gate_logits, logits, u, v, T,
        SPLITS=1 if u_parts is None else u_parts.shape[0], ACC=host.dot_constants(u)["ACC"], **constants, tile=tile,
    )  # fmt: skip


def mix_bwd(
    dv_parts: Tensor,  # (splits, T, E R)
    dv: Tensor,  # scratch of T E R elements
    tensors: MixTensors,
    scaling: float,
    constants: Constants,
    tile: Tile,
) -> None:
    """Add up the partial sums of dv and compute the gradients of the mix."""
    splits, T, _ = dv_parts.shape
    logits, dlogits_in, u, du, dlogits, v = tensors
    host.launch(
        _mix_bwd_kernel, (tile.tiles_of(T),),
        dv_parts, logits, dlogits_in, u, dv, du, dlogits, v, scaling, T,
        SPLITS=splits, ACC=host.dot_constants(u)["ACC"], **constants, tile=tile,
    )  # fmt: skip


def grouped_mix_fwd(
    u: Tensor,  # (T, E, R)
    route: Tensor,  # (K, 2 T + E + 1)
    v: Tensor,  # (T, K, R), written
    constants: Constants,
    tile: Tile,
    *,
    gates: Tensor | None = None,  # (K, T)
    logits: Tensor | None = None,  # (T, E), where gates is None
) -> None:
    """Blend the experts that every token keeps."""
    host.launch(
        _grouped_mix_fwd_kernel, (tile.tiles_of(u.shape[0]),),
        u, gates, logits, route, v, u.shape[0], **_grouped(u, constants), tile=tile,
    )  # fmt: skip


def grouped_mix_bwd(
    dv: Tensor,  # (T, K, R)
    tensors: MixTensors,
    route: Tensor,  # (K, 2 T + E + 1)
    constants: Constants,
    tile: Tile,
) -> None:
    """The gradients of the mix, for the experts that are kept."""
    logits, dlogits_in, u, du, dlogits, v = tensors
    host.launch(
        _grouped_mix_bwd_kernel, (tile.tiles_of(u.shape[0]),),
        u, dv, logits, route, dlogits_in, du, v, dlogits, u.shape[0], **_grouped(u, constants), tile=tile,
    )  # fmt: skip


def _grouped(u: Tensor, constants: Constants) -> dict[str, object]:
    names = ("E", "R", "MIXING", "TOP_K", "RENORMALIZE")
    return {name: constants[name] for name in names} | {"ACC": host.dot_constants(u)["ACC"]}


@triton.jit(do_not_specialize=["T"])
def _mix_fwd_kernel(
    u_parts_ptr,  # (SPLITS, T, ER); None: u is complete
    logit_parts_ptr,  # (SPLITS, T, E); None: the logits are given
    gate_bias_ptr,  # (E) or None
    gate_logits_ptr,  # (T, E), where logit_parts is None
    logits_ptr,  # (T, E), written; or None
    u_ptr,  # (T, E, R) or (T, 1, R), written where u_parts is given
    v_ptr,  # (T, E, R), written
    T,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the partial sums of a tile of tokens in their order, then mix."""
    wait_for_previous_kernel(PDL)
    ER: tl.constexpr = EXPERTS_OF_A * R
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    if u_parts_ptr is not None:
        for start in range(0, ER, BLOCK_ER):
            er = start + tl.arange(0, BLOCK_ER)
            store_rows(sum_splits(u_parts_ptr, t, er, T, ER, SPLITS), u_ptr, t, er, T, ER)
        tl.debug_barrier()  # every thread sees u
    let_next_kernel_start(PDL)
    logits = tl.zeros((BLOCK_T, BLOCK_E), ACC)
    if logit_parts_ptr is not None:
        logits = sum_splits(logit_parts_ptr, t, e, T, E, SPLITS)
    logits = router_logits(logits, gate_bias_ptr, gate_logits_ptr, logits_ptr, t, e, T, E)
    gates = gates_of(logits, e, E, TOP_K, RENORMALIZE)
    mix_fwd_tile(u_ptr, v_ptr, gates, t, e, T, E, EXPERTS_OF_A, R, MIXING, BLOCK_R)


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
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the partial sums of a tile of tokens in their order, then the backward of the mix."""
    wait_for_previous_kernel(PDL)
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    for start in range(0, E * R, BLOCK_ER):
        er = start + tl.arange(0, BLOCK_ER)
        dv = sum_splits(dv_parts_ptr, t, er, T, E * R, SPLITS)
        store_rows(dv * scaling, dv_ptr, t, er, T, E * R)
    let_next_kernel_start(PDL)
    tl.debug_barrier()  # every thread sees dv
    gate_and_mix_bwd_tile(
        logits_ptr, dlogits_in_ptr, u_ptr, dv_ptr, du_ptr, dlogits_ptr, v_ptr,
        t, e, T, E, EXPERTS_OF_A, R, MIXING, TOP_K, RENORMALIZE, ACC, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _grouped_mix_fwd_kernel(
    u_ptr,  # (T, E, R)
    gates_ptr,  # (K, T) or None
    logits_ptr,  # (T, E), where gates is None
    route_ptr,  # (K, 2 T + E + 1)
    v_ptr,  # (T, K, R), written
    T,
    E: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """v[t, slot] = gate * h, the blend of the slots, or gate * u of the slot, as MIXING says."""
    wait_for_previous_kernel(PDL)
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    if gates_ptr is None:
        gates = _softmax_of_route(logits_ptr, route_ptr, t, e, T, E, TOP_K, RENORMALIZE, ACC)
    else:
        gates = tl.zeros((BLOCK_T, BLOCK_E), ACC)
        for slot in range(TOP_K):
            gate = tl.load(gates_ptr + tl.cast(slot, tl.int64) * T + t, mask=t < T, other=0.0)[:, None]
            gates = tl.where(e[None, :] == _expert_of_slot(route_ptr, slot, t, T, E), gate, gates)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h = tl.zeros((BLOCK_T, BLOCK_R), ACC)
        if MIXING != "per expert":
            h = _blend_slots(u_ptr, True, gates, route_ptr, t, e, r, T, E, R, TOP_K)
        for slot in range(TOP_K):
            expert = _expert_of_slot(route_ptr, slot, t, T, E)
            if MIXING == "per expert":
                h = _load_slot(u_ptr, expert, E, t, r, T, R, ACC)
            _store_slot(gate_column(gates, e, expert) * h, v_ptr, slot, t, r, T, R, TOP_K)


@triton.jit(do_not_specialize=["T"])
def _grouped_mix_bwd_kernel(
    u_ptr,  # (T, E, R)
    dv_ptr,  # (T, K, R)
    logits_ptr,  # (T, E)
    route_ptr,  # (K, 2 T + E + 1)
    dlogits_in_ptr,  # (T, E) or None
    du_ptr,  # (T, K, R), written; or None
    v_ptr,  # (T, K, R), written; or None
    dlogits_ptr,  # (T, E), written
    T,
    E: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """du and v slot by slot, and the gradient of all the logits of a tile of tokens; the same formulas as `mix_bwd_tile`."""
    wait_for_previous_kernel(PDL)
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    softmax = _softmax_of_route(logits_ptr, route_ptr, t, e, T, E, TOP_K, RENORMALIZE, ACC)
    dgates = tl.zeros((BLOCK_T, BLOCK_E), ACC)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h, dh = tl.zeros((BLOCK_T, BLOCK_R), ACC), tl.zeros((BLOCK_T, BLOCK_R), ACC)
        if MIXING != "per expert":
            h = _blend_slots(u_ptr, True, softmax, route_ptr, t, e, r, T, E, R, TOP_K)
            dh = _blend_slots(dv_ptr, False, softmax, route_ptr, t, e, r, T, E, R, TOP_K)
        for slot in range(TOP_K):
            expert = _expert_of_slot(route_ptr, slot, t, T, E)
            gate = gate_column(softmax, e, expert)
            u, dv = _load_slot(u_ptr, expert, E, t, r, T, R, ACC), _load_slot(dv_ptr, slot, TOP_K, t, r, T, R, ACC)
            if MIXING == "per expert":
                h, dh = u, dv
                dgate = dv * u
            else:
                dgate = dv * h + dh * u
            dgates += tl.where(e[None, :] == expert, tl.sum(dgate, axis=1)[:, None], 0.0)
            if du_ptr is not None:
                _store_slot(gate * dh, du_ptr, slot, t, r, T, R, TOP_K)
            if v_ptr is not None:
                _store_slot(gate * h, v_ptr, slot, t, r, T, R, TOP_K)
    let_next_kernel_start(PDL)
    dlogits = softmax_bwd(softmax, dgates)
    if dlogits_in_ptr is not None:
        dlogits += load_rows(dlogits_in_ptr, t, e, T, E).to(ACC)
    store_rows(dlogits, dlogits_ptr, t, e, T, E)


@triton.jit
def _expert_of_slot(route_ptr, slot, t, T, E: tl.constexpr):
    """The expert that each token has in a slot: (BLOCK_T, 1)."""
    experts, _, _ = parts_of_slot(route_ptr, slot, T, E)
    return tl.load(experts + t, mask=t < T, other=0)[:, None]


@triton.jit
def _softmax_of_route(
    logits_ptr,  # (T, E)
    route_ptr,  # (K, 2 T + E + 1)
    t,  # (BLOCK_T) tokens
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The softmax that the forward computed, over the route's experts or over all: (BLOCK_T, BLOCK_E)."""
    logits = load_rows(logits_ptr, t, e, T, E).to(ACC)
    among = tl.broadcast_to((e < E)[None, :], logits.shape)
    if RENORMALIZE:
        among = tl.broadcast_to((e < 0)[None, :], logits.shape)
        for slot in range(TOP_K):
            among = among | (e[None, :] == _expert_of_slot(route_ptr, slot, t, T, E))
    return softmax_among(logits, among)


@triton.jit
def _load_slot(
    values_ptr,  # (T, ROWS, R)
    row,  # of each token: (BLOCK_T, 1), or one number
    ROWS: tl.constexpr,
    t,  # (BLOCK_T) tokens
    r,  # (BLOCK_R) ranks
    T,
    R: tl.constexpr,
    ACC: tl.constexpr,
):
    """values[t, row]: (BLOCK_T, BLOCK_R)."""
    mask = (t < T)[:, None] & (r < R)[None, :]
    at = (t.to(tl.int64)[:, None] * ROWS + row) * R + r[None, :]
    return tl.load(values_ptr + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _blend_slots(
    values_ptr,  # (T, E, R) or (T, K, R)
    BY_EXPERT: tl.constexpr,  # which of the two
    gates,  # (BLOCK_T, BLOCK_E)
    route_ptr,  # (K, 2 T + E + 1)
    t,  # (BLOCK_T) tokens
    e,  # (BLOCK_E) experts
    r,  # (BLOCK_R) ranks
    T,
    E: tl.constexpr,
    R: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """sum_slots gate * values: (BLOCK_T, BLOCK_R)."""
    total = tl.zeros((t.shape[0], r.shape[0]), gates.dtype)
    for slot in range(TOP_K):
        expert = _expert_of_slot(route_ptr, slot, t, T, E)
        if BY_EXPERT:
            values = _load_slot(values_ptr, expert, E, t, r, T, R, gates.dtype)
        else:
            values = _load_slot(values_ptr, slot, TOP_K, t, r, T, R, gates.dtype)
        total += gate_column(gates, e, expert) * values
    return total


@triton.jit
def _store_slot(values, out_ptr, slot, t, r, T, R: tl.constexpr, TOP_K: tl.constexpr):
    """out[t, slot] = values, out of shape (T, K, R)."""
    mask = (t < T)[:, None] & (r < R)[None, :]
    row = t.to(tl.int64) * TOP_K + slot
    tl.store(out_ptr + row[:, None] * R + r[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)
