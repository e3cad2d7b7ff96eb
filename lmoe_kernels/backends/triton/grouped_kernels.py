"""The kernels of `grouped`: tiles are tokens of one expert, gathered through the order that the route left."""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl

from lmoe_kernels.backends.triton.tiles import (
    APART,
    expand_tile,
    load_rows,
    shrink_tile,
    softmax_among,
    softmax_and_kept,
    softmax_bwd,
    store_rows,
    sum_splits,
    write_tile,
)


@triton.jit(do_not_specialize=["T"])
def _route_fwd_kernel(
    logit_parts_ptr,  # (SPLITS, T, E) or None
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
    if logit_parts_ptr is not None:
        logits = sum_splits(logit_parts_ptr, t, e, T, E, SPLITS)
    else:
        logits = load_rows(gate_logits_ptr, t, e, T, E).to(ACC)
    if logits_ptr is not None:
        store_rows(logits, logits_ptr, t, e, T, E)
    softmax, kept = softmax_and_kept(logits, e, E, TOP_K, RENORMALIZE)
    for slot in range(TOP_K):
        expert = tl.min(tl.where(kept, e[None, :], BLOCK_E), axis=1)
        mine = e[None, :] == expert[:, None]
        at = tl.cast(slot, tl.int64) * T + t
        tl.store(gates_ptr + at, tl.sum(tl.where(mine, softmax, 0.0), axis=1), mask=t < T)
        tl.store(experts_ptr + at, expert, mask=t < T)
        kept = kept & (mine == 0)


@triton.jit
def _tile_of_group(
    order_ptr,  # (T), one slot's
    bounds_ptr,  # (E + 1), one slot's
    program,
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The expert of a program, E where nothing is left for it, and its tokens (BLOCK_T), T where there are fewer."""
    begin = tl.load(bounds_ptr + e, mask=e < E, other=0)
    end = tl.load(bounds_ptr + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_T)
    expert = tl.sum(((tl.cumsum(tiles, axis=0) <= program) & (e < E)).to(tl.int32), axis=0)
    tile = program - tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    at = tl.sum(tl.where(e == expert, begin, 0), axis=0) + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = at < tl.sum(tl.where(e == expert, end, 0), axis=0)
    return expert, tl.load(order_ptr + at, mask=mine, other=T)


@triton.jit(do_not_specialize=["T"])
def _grouped_shrink_fwd_kernel(
    rows_ptr, stride_t,  # (T, F)
    factor_ptr,  # (E, R, F)
    order_ptr,  # (K, T)
    bounds_ptr,  # (K, E + 1)
    out_ptr,  # (T, E or K, R), written
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
):  # fmt: skip
    """A tile of tokens of one expert, projected onto its factor."""
    slot, e = tl.program_id(1), tl.arange(0, BLOCK_E)
    bounds, order = bounds_ptr + slot * (E + 1), order_ptr + slot.to(tl.int64) * T
    expert, t = _tile_of_group(order, bounds, tl.program_id(0), e, T, E, BLOCK_T)
    if expert < E:
        r = tl.arange(0, BLOCK_ER)
        factor = factor_ptr + expert.to(tl.int64) * R * F
        u, _ = shrink_tile(rows_ptr, stride_t, factor, None, t, r, e, 0, F, T, F, R, E, ACC, PRECISION, BLOCK_F)
        row = t.to(tl.int64) * OUT_ROWS + (expert if BY_EXPERT else slot)
        mask = (t < T)[:, None] & (r < R)[None, :]
        tl.store(out_ptr + row[:, None] * R + r[None, :], (u * scaling).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _grouped_mix_fwd_kernel(
    u_ptr,  # (T, E, R)
    gates_ptr,  # (K, T)
    experts_ptr,  # (K, T)
    v_ptr,  # (T, K, R), written
    T,
    E: tl.constexpr,
    R: tl.constexpr,
    MIX: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """v[t, slot] = gate times the blend of the slots, or times each slot's own u."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h = _blend_slots(u_ptr, E, gates_ptr, experts_ptr, t, r, T, R, TOP_K)
        for slot in range(TOP_K):
            gate, u = _slot(u_ptr, E, gates_ptr, experts_ptr, slot, t, r, T, R)
            if MIX == APART:
                h = u
            _store_slot(gate * h, v_ptr, slot, t, r, T, R, TOP_K)


@triton.jit(do_not_specialize=["T"])
def _grouped_mix_bwd_kernel(
    u_ptr,  # (T, E, R)
    dv_ptr,  # (T, K, R)
    gates_ptr,  # (K, T)
    experts_ptr,  # (K, T)
    logits_ptr,  # (T, E), where the gates are of a softmax over all experts; else None
    dlogits_in_ptr,  # (T, E) or None
    du_ptr,  # (T, K, R), written; or None
    v_ptr,  # (T, K, R), written; or None
    dlogits_ptr,  # (T, E), written
    T,
    E: tl.constexpr,
    R: tl.constexpr,
    MIX: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """du and v slot by slot, and the gradient of all the logits of a tile of tokens; as `mix_bwd_tile`."""
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    gates = tl.zeros((BLOCK_T, BLOCK_E), gates_ptr.dtype.element_ty)
    dgates = tl.zeros((BLOCK_T, BLOCK_E), gates_ptr.dtype.element_ty)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h = _blend_slots(u_ptr, E, gates_ptr, experts_ptr, t, r, T, R, TOP_K)
        dh = _blend_slots(dv_ptr, TOP_K, gates_ptr, None, t, r, T, R, TOP_K)
        for slot in range(TOP_K):
            gate, u = _slot(u_ptr, E, gates_ptr, experts_ptr, slot, t, r, T, R)
            _, dv = _slot(dv_ptr, TOP_K, gates_ptr, None, slot, t, r, T, R)
            if MIX == APART:
                h, dh = u, dv
                through = dv * u
            else:
                through = dv * h + dh * u
            mine = tl.load(experts_ptr + tl.cast(slot, tl.int64) * T + t, mask=t < T, other=0)[:, None] == e[None, :]
            gates = tl.where(mine, gate, gates)
            dgates += tl.where(mine, tl.sum(through, axis=1)[:, None], 0.0)
            if du_ptr is not None:
                _store_slot(gate * dh, du_ptr, slot, t, r, T, R, TOP_K)
            if v_ptr is not None:
                _store_slot(gate * h, v_ptr, slot, t, r, T, R, TOP_K)
    softmax = gates
    if logits_ptr is not None:
        every = tl.broadcast_to((e < E)[None, :], gates.shape)
        softmax = softmax_among(load_rows(logits_ptr, t, e, T, E).to(gates.dtype), every)
    dlogits = softmax_bwd(softmax, dgates)
    if dlogits_in_ptr is not None:
        dlogits += load_rows(dlogits_in_ptr, t, e, T, E).to(dlogits.dtype)
    store_rows(dlogits, dlogits_ptr, t, e, T, E)


@triton.jit
def _slot(
    values_ptr,  # (T, ROWS, R)
    ROWS: tl.constexpr,
    gates_ptr,  # (K, T)
    experts_ptr,  # (K, T): the row is the slot's expert; or None: the slot
    slot,
    t,  # (BLOCK_T) tokens
    r,  # (BLOCK_R) ranks
    T,
    R: tl.constexpr,
):
    """The gates (BLOCK_T, 1) and the values (BLOCK_T, BLOCK_R) of a slot."""
    at = tl.cast(slot, tl.int64) * T + t
    gate = tl.load(gates_ptr + at, mask=t < T, other=0.0)[:, None]
    row = t.to(tl.int64) * ROWS
    if experts_ptr is not None:
        row += tl.load(experts_ptr + at, mask=t < T, other=0)
    else:
        row += slot
    mask = (t < T)[:, None] & (r < R)[None, :]
    return gate, tl.load(values_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0).to(gate.dtype)


@triton.jit
def _blend_slots(values_ptr, ROWS: tl.constexpr, gates_ptr, experts_ptr, t, r, T, R: tl.constexpr, TOP_K: tl.constexpr):
    """sum_slots gate * values, the arguments as `_slot` has them: (BLOCK_T, BLOCK_R)."""
    total = tl.zeros((t.shape[0], r.shape[0]), gates_ptr.dtype.element_ty)
    for slot in range(TOP_K):
        gate, values = _slot(values_ptr, ROWS, gates_ptr, experts_ptr, slot, t, r, T, R)
        total += gate * values
    return total


@triton.jit
def _store_slot(values, out_ptr, slot, t, r, T, R: tl.constexpr, TOP_K: tl.constexpr):
    """out[t, slot] = values, out of shape (T, K, R)."""
    mask = (t < T)[:, None] & (r < R)[None, :]
    row = t.to(tl.int64) * TOP_K + slot
    tl.store(out_ptr + row[:, None] * R + r[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


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
    """What one slot adds to a tile of tokens of one expert, and some features."""
    e, f = tl.arange(0, BLOCK_E), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    bounds, order = bounds_ptr + slot * (E + 1), order_ptr + tl.cast(slot, tl.int64) * T
    expert, t = _tile_of_group(order, bounds, tl.program_id(0), e, T, E, BLOCK_T)
    if expert < E:
        r = tl.arange(0, BLOCK_ER)
        mask = (t < T)[:, None] & (r < R)[None, :]
        row = t.to(tl.int64) * TOP_K + slot
        v = tl.load(v_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0)
        factor = factor_ptr + expert.to(tl.int64) * R * F
        acc = expand_tile(v, factor, tl.zeros((BLOCK_T, BLOCK_F), ACC), r, f, F, R, PRECISION)
        write_tile(acc * scaling, base_ptr, base_stride_t, out_ptr, t, f, T, F)


@triton.jit(do_not_specialize=["T"])
def _grouped_wgrad_bwd_kernel(
    rows_ptr, stride_t,  # (T, F)
    coefficients_ptr,  # (T, K, R)
    order_ptr,  # (K, T)
    bounds_ptr,  # (K, E + 1)
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
):  # fmt: skip
    """Some features of one expert's gradient: its tokens slot by slot, in their order."""
    f, r = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_ER)
    expert = tl.program_id(1)
    acc = tl.zeros((BLOCK_F, BLOCK_ER), ACC)
    for slot in range(TOP_K):
        bounds, order = bounds_ptr + slot * (E + 1) + expert, order_ptr + tl.cast(slot, tl.int64) * T
        begin, end = tl.load(bounds), tl.load(bounds + 1)
        for start in range(begin, end, BLOCK_T):
            at = start + tl.arange(0, BLOCK_T)
            t = tl.load(order + at, mask=at < end, other=0).to(tl.int64)
            x = tl.load(
                rows_ptr + t[:, None] * stride_t + f[None, :], mask=(at < end)[:, None] & (f < F)[None, :], other=0.0
            )
            row = t * TOP_K + slot
            mask = (at < end)[:, None] & (r < R)[None, :]
            c = tl.load(coefficients_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0)
            # [BLOCK_F, BLOCK_T] @ [BLOCK_T, BLOCK_ER] -> [BLOCK_F, BLOCK_ER]
            acc = tl.dot(tl.trans(x), c, acc, input_precision=PRECISION, out_dtype=ACC)
    at = out_ptr + (expert.to(tl.int64) * R + r)[None, :] * F + f[:, None]
    tl.store(at, (acc * scaling).to(out_ptr.dtype.element_ty), mask=(r < R)[None, :] & (f < F)[:, None])
