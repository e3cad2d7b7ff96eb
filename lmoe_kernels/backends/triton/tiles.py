"""The steps that kernels are put together from, each on one tile of tokens: shrink, gate, mix, expand.

Letters: T tokens, F features (I or O), E experts, R rank. `ER` counts the rows of a factor: E * R, or R where one A is
shared by all experts. Accumulators are fp32 (fp64 for fp64) throughout; `u`, `dv` and `v` are rounded once, to the tokens'
dtype.

The mix does not reshape accumulators. A shrink leaves its tile in memory, where it is still in cache, and the mix walks over
the experts on (BLOCK_T, BLOCK_R) slices: E and R need not be powers of two, no layout is converted, and compiled for sm_90
it takes a third of the registers that a reshape takes, so that tiles of 128 tokens do not spill.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl

# How a token's experts meet their gates.
BLEND = tl.constexpr(0)  # mixing="factors": what a gate multiplies is the blend of all experts, h = sum_e g_e u_e
APART = tl.constexpr(1)  # mixing="outputs": each expert's own u_e
SHARED = tl.constexpr(2)  # one A for all experts: its only u, which is its own blend where the gates sum to one


@triton.jit
def shrink_tile(
    rows_ptr,  # (T, F)
    stride_t,  # of rows
    factor_ptr,  # (ER, F)
    gate_ptr,  # (E, F) or None
    t,  # (BLOCK_T) tokens
    er,  # (BLOCK_ER) rows of the factor
    e,  # (BLOCK_E) experts
    f_from,  # the features from .. to are summed over; `f_to` beyond F counts as F
    f_to,
    T,
    F,
    ER: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """rows factor^T and rows gate^T from one reading of the rows: (BLOCK_T, BLOCK_ER) and (BLOCK_T, BLOCK_E)."""
    acc = tl.zeros((t.shape[0], er.shape[0]), ACC)
    logits = tl.zeros((t.shape[0], e.shape[0]), ACC)
    f = tl.arange(0, BLOCK_F)
    rows = rows_ptr + t.to(tl.int64)[:, None] * stride_t + f[None, :]
    factor = factor_ptr + er.to(tl.int64)[None, :] * F + f[:, None]
    for start in range(f_from, f_to, BLOCK_F):
        inside = start + f < F
        x = tl.load(rows + start, mask=(t < T)[:, None] & inside[None, :], other=0.0)
        a = tl.load(factor + start, mask=(er < ER)[None, :] & inside[:, None], other=0.0)
        # [BLOCK_T, BLOCK_F] @ [BLOCK_F, BLOCK_ER] -> [BLOCK_T, BLOCK_ER]
        acc = tl.dot(x, a, acc, input_precision=PRECISION, out_dtype=ACC)
        if gate_ptr is not None:
            gate = gate_ptr + e.to(tl.int64)[None, :] * F + f[:, None]
            w = tl.load(gate + start, mask=(e < E)[None, :] & inside[:, None], other=0.0)
            # [BLOCK_T, BLOCK_F] @ [BLOCK_F, BLOCK_E] -> [BLOCK_T, BLOCK_E]
            logits = tl.dot(x, w, logits, input_precision=PRECISION, out_dtype=ACC)
    return acc, logits


@triton.jit
def load_rows(
    rows_ptr,  # (T, C), contiguous
    t,  # (BLOCK_T) tokens
    c,  # (BLOCK_C) columns
    T,
    C: tl.constexpr,
):
    """rows[t, c], zero outside: (BLOCK_T, BLOCK_C)."""
    mask = (t < T)[:, None] & (c < C)[None, :]
    return tl.load(rows_ptr + t.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    tile,  # (BLOCK_T, BLOCK_C)
    rows_ptr,  # (T, C), contiguous, written
    t,  # (BLOCK_T) tokens
    c,  # (BLOCK_C) columns
    T,
    C: tl.constexpr,
):
    """rows[t, c] = tile, in the dtype of the rows."""
    mask = (t < T)[:, None] & (c < C)[None, :]
    tl.store(rows_ptr + t.to(tl.int64)[:, None] * C + c[None, :], tile.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_splits(
    parts_ptr,  # (SPLITS, T, C)
    t,  # (BLOCK_T) tokens
    c,  # (BLOCK_C) columns
    T,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The sum of the splits in their order: (BLOCK_T, BLOCK_C)."""
    total = load_rows(parts_ptr, t, c, T, C)
    for split in range(1, SPLITS):
        total += load_rows(parts_ptr + tl.cast(split, tl.int64) * T * C, t, c, T, C)
    return total


@triton.jit
def keep_top_k(
    logits,  # (BLOCK_T, BLOCK_E)
    e,  # (BLOCK_E) experts
    E: tl.constexpr,
    TOP_K: tl.constexpr,  # E: all are kept
):
    """The experts kept of each token, (BLOCK_T, BLOCK_E): the TOP_K largest logits; of equal ones the lower expert index."""
    kept = tl.broadcast_to((e < E)[None, :], logits.shape)
    if TOP_K < E:
        rest = tl.where(logits == logits, logits, float("inf"))  # a NaN is kept and makes its whole row NaN
        rest = tl.where(kept, rest, float("-inf"))
        kept = tl.broadcast_to((e < 0)[None, :], logits.shape)
        for _ in range(TOP_K):
            best = tl.max(tl.where(kept, float("-inf"), rest), axis=1)[:, None]
            candidates = (rest == best) & (kept == 0)
            first = tl.min(tl.where(candidates, e[None, :], e.shape[0]), axis=1)[:, None]
            kept = kept | (e[None, :] == first)
    return kept


@triton.jit
def softmax_among(
    logits,  # (BLOCK_T, BLOCK_E)
    among,  # (BLOCK_T, BLOCK_E)
):
    """Softmax (BLOCK_T, BLOCK_E) over some experts, 0 for the others."""
    largest = tl.max(tl.where(among, logits, float("-inf")), axis=1)[:, None]
    weights = tl.where(among, tl.exp(logits - largest), 0.0)
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def softmax_and_kept(
    logits,  # (BLOCK_T, BLOCK_E)
    e,  # (BLOCK_E) experts
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Softmax over the experts kept, or over all, and which are kept: (BLOCK_T, BLOCK_E) both."""
    kept = keep_top_k(logits, e, E, TOP_K)
    among = kept if RENORMALIZE else tl.broadcast_to((e < E)[None, :], logits.shape)
    return softmax_among(logits, among), kept


@triton.jit
def of_kept(
    values,  # (BLOCK_T, BLOCK_E)
    kept,  # (BLOCK_T, BLOCK_E)
    RENORMALIZE: tl.constexpr,
):
    """The values of the experts kept, 0 for the others; as they are beside a softmax that is 0 there."""
    return values if RENORMALIZE else tl.where(kept, values, 0.0)


@triton.jit
def gates_of(
    logits,  # (BLOCK_T, BLOCK_E), where they are made here
    given_ptr,  # (T, E), where they come from outside; else None
    logits_ptr,  # (T, E), written; or None
    t,  # (BLOCK_T) tokens
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """The gates of a tile of tokens, from logits made here or given: (BLOCK_T, BLOCK_E)."""
    if given_ptr is not None:
        logits = load_rows(given_ptr, t, e, T, E).to(logits.dtype)
    if logits_ptr is not None:
        store_rows(logits, logits_ptr, t, e, T, E)
    softmax, kept = softmax_and_kept(logits, e, E, TOP_K, RENORMALIZE)
    return of_kept(softmax, kept, RENORMALIZE)


@triton.jit
def gate_of(gates, e, expert):
    """The gates of one expert: (BLOCK_T, 1)."""
    return tl.sum(tl.where(e[None, :] == expert, gates, 0.0), axis=1)[:, None]


@triton.jit
def blend(
    per_expert_ptr,  # (T, E, R), already at the tile's (BLOCK_T, BLOCK_R) elements of expert 0
    mask,  # (BLOCK_T, BLOCK_R)
    gates,  # (BLOCK_T, BLOCK_E)
    e,  # (BLOCK_E) experts
    E: tl.constexpr,
    STEP: tl.constexpr,  # from one expert to the next: R, or 0 where they share one
):
    """sum_e gates[t,e] per_expert[t,e,r]: (BLOCK_T, BLOCK_R)."""
    total = tl.zeros(mask.shape, gates.dtype)
    for expert in range(E):
        one = tl.load(per_expert_ptr + expert * STEP, mask=mask, other=0.0).to(gates.dtype)
        total += gate_of(gates, e, expert) * one
    return total


@triton.jit
def mix_fwd_tile(
    u_ptr,  # (T, E, R) or (T, 1, R)
    v_ptr,  # (T, E, R), written
    gates,  # (BLOCK_T, BLOCK_E)
    t,  # (BLOCK_T) tokens
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    E_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """v[t,e,r] = gates[t,e] times what `MIX` says that a gate multiplies."""
    U_STEP: tl.constexpr = R if E_OF_A == E else 0  # pyright: ignore[reportAssignmentType]
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (t < T)[:, None] & (r < R)[None, :]
        u_at = u_ptr + t.to(tl.int64)[:, None] * (E_OF_A * R) + r[None, :]
        v_at = v_ptr + t.to(tl.int64)[:, None] * (E * R) + r[None, :]
        h = blend(u_at, mask, gates, e, E, U_STEP) if MIX == BLEND else tl.load(u_at, mask=mask, other=0.0).to(gates.dtype)
        for expert in range(E):
            if MIX == APART:
                h = tl.load(u_at + expert * R, mask=mask, other=0.0).to(gates.dtype)
            v = gate_of(gates, e, expert) * h
            tl.store(v_at + expert * R, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mix_bwd_tile(
    u_ptr,  # (T, E, R) or (T, 1, R)
    dv_ptr,  # (T, E, R)
    du_ptr,  # shaped as u, written; or None
    v_ptr,  # (T, E, R), written; or None
    gates,  # (BLOCK_T, BLOCK_E)
    t,  # (BLOCK_T) tokens
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
    E_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradients of the mix: writes du and v, returns that of the gates (BLOCK_T, BLOCK_E).

    Under BLEND a gate enters twice, through B(t) and through A(t): dg_e = <dv_e, h> + <dh, u_e>. Under SHARED the second
    term is the same for all experts, and the softmax takes it away.
    """
    U_STEP: tl.constexpr = R if E_OF_A == E else 0  # pyright: ignore[reportAssignmentType]
    dgates = tl.zeros(gates.shape, gates.dtype)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (t < T)[:, None] & (r < R)[None, :]
        u_at = u_ptr + t.to(tl.int64)[:, None] * (E_OF_A * R) + r[None, :]
        of_expert_0 = t.to(tl.int64)[:, None] * (E * R) + r[None, :]
        h = blend(u_at, mask, gates, e, E, U_STEP) if MIX == BLEND else tl.load(u_at, mask=mask, other=0.0).to(gates.dtype)
        dh = h if MIX == APART else blend(dv_ptr + of_expert_0, mask, gates, e, E, R)
        for expert in range(E):
            gate = gate_of(gates, e, expert)
            dv = tl.load(dv_ptr + of_expert_0 + expert * R, mask=mask, other=0.0).to(gates.dtype)
            if MIX == APART:
                h = tl.load(u_at + expert * R, mask=mask, other=0.0).to(gates.dtype)
                dh = dv
            through = dv * h
            if MIX == BLEND:
                through += dh * tl.load(u_at + expert * U_STEP, mask=mask, other=0.0).to(gates.dtype)
            dgates += tl.where(e[None, :] == expert, tl.sum(through, axis=1)[:, None], 0.0)
            if du_ptr is not None and E_OF_A == E:
                du_at = du_ptr + of_expert_0 + expert * R
                tl.store(du_at, (gate * dh).to(du_ptr.dtype.element_ty), mask=mask)
            if v_ptr is not None:
                v_at = v_ptr + of_expert_0 + expert * R
                tl.store(v_at, (gate * h).to(v_ptr.dtype.element_ty), mask=mask)
        if du_ptr is not None and E_OF_A < E:  # du_0 gathers from every expert; under SHARED dh has all of it
            du = tl.sum(gates, axis=1)[:, None] * dh if MIX == BLEND else dh
            tl.store(du_ptr + t.to(tl.int64)[:, None] * R + r[None, :], du.to(du_ptr.dtype.element_ty), mask=mask)
    return dgates


@triton.jit
def softmax_bwd(
    softmax,  # (BLOCK_T, BLOCK_E)
    dgates,  # (BLOCK_T, BLOCK_E), 0 where the softmax has a value and the gate has not
):
    """The gradient of the logits (BLOCK_T, BLOCK_E)."""
    return softmax * (dgates - tl.sum(softmax * dgates, axis=1)[:, None])


@triton.jit
def expand_tile(
    v,  # (BLOCK_T, BLOCK_ER)
    factor_ptr,  # (ER, F)
    acc,  # (BLOCK_T, BLOCK_F)
    er,  # (BLOCK_ER) rows of the factor
    f,  # (BLOCK_F) features
    F,
    ER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + v factor: (BLOCK_T, BLOCK_F)."""
    mask = (er < ER)[:, None] & (f < F)[None, :]
    b = tl.load(factor_ptr + er.to(tl.int64)[:, None] * F + f[None, :], mask=mask, other=0.0)
    # [BLOCK_T, BLOCK_ER] @ [BLOCK_ER, BLOCK_F] -> [BLOCK_T, BLOCK_F]
    return tl.dot(v, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def write_tile(
    acc,  # (BLOCK_T, BLOCK_F)
    base_ptr,  # (T, F), (F) with base_stride_t = 0, or None
    base_stride_t,
    out_ptr,  # (T, F), contiguous
    t,  # (BLOCK_T) tokens
    f,  # (BLOCK_F) features
    T,
    F,
):
    """out[t] = base[t] + acc."""
    mask = (t < T)[:, None] & (f < F)[None, :]
    if base_ptr is not None:
        base = tl.load(base_ptr + t.to(tl.int64)[:, None] * base_stride_t + f[None, :], mask=mask, other=0.0)
        acc += base.to(acc.dtype)
    tl.store(out_ptr + t.to(tl.int64)[:, None] * F + f[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
