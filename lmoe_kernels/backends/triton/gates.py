# SPDX-License-Identifier: Apache-2.0
"""Device functions on one tile of tokens: router logits, top_k, softmax, mix, and their backward.

The mix does not reshape accumulators. A shrink stores its tile, and the mix loads it again, from the cache, in slices of
(BLOCK_T, BLOCK_R), one for each expert: E and R need not be powers of two, no layout is converted, and compiled for sm_90
this takes a third of the registers that a reshape takes, so that tiles of 128 tokens do not spill.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl

from lmoe_kernels.backends.triton.tiles import load_rows, store_rows

# MIXING is what the gate of an expert e multiplies:
# "blended": h = sum_f gates[f] u[f], the same for all e; mixing="factors"
# "per expert": u[e]; mixing="outputs"
# "shared a": the only u of a shared A; mixing="outputs", or "factors" with gates that sum to one
# TOP_K is 0 if the caller gives gates: they come in place of the logits, and there is no softmax.
# Kernels use these words and no global constants. Triton (3.6 and 3.7) would hash such constants into a kernel's name on the
# disk only if another kernel was hashed before, so that another process could look for another name (see precompile.py).


@triton.jit
def keep_top_k(
    logits,  # (BLOCK_T, BLOCK_E)
    e,  # (BLOCK_E) experts
    E: tl.constexpr,
    TOP_K: tl.constexpr,  # E: all are kept
):
    """Which experts each token keeps (BLOCK_T, BLOCK_E): those of the TOP_K largest logits.

    Of equal logits the one of the lower expert index is kept.
    """
    kept = tl.broadcast_to((e < E)[None, :], logits.shape)
    if TOP_K < E:
        rest = tl.where(logits == logits, logits, float("inf"))  # keep a NaN: it then makes all gates of its token NaN
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
    among,  # (BLOCK_T, BLOCK_E) of bool
):
    """Softmax (BLOCK_T, BLOCK_E) over the experts in `among`, 0 for the others."""
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
    """Softmax over the kept experts, or over all; and which experts are kept. Both are (BLOCK_T, BLOCK_E)."""
    kept = keep_top_k(logits, e, E, TOP_K)
    among = kept if RENORMALIZE else tl.broadcast_to((e < E)[None, :], logits.shape)
    return softmax_among(logits, among), kept


@triton.jit
def zero_dropped(
    values,  # (BLOCK_T, BLOCK_E)
    kept,  # (BLOCK_T, BLOCK_E)
    RENORMALIZE: tl.constexpr,
):
    """The values with 0 for the dropped experts; unchanged where the softmax is 0 for them already."""
    return values if RENORMALIZE else tl.where(kept, values, 0.0)


@triton.jit
def router_logits(
    products,  # (BLOCK_T, BLOCK_E), x gate_weight^T; unused where the logits come from outside
    bias_ptr,  # (E), added to the products; or None
    gate_logits_ptr,  # (T, E), logits from outside, which replace the products; or None
    logits_ptr,  # (T, E), written; or None
    t,  # (BLOCK_T) tokens
    e,  # (BLOCK_E) experts
    T,
    E: tl.constexpr,
):
    """The logits of a tile of tokens (BLOCK_T, BLOCK_E), computed or from outside; stored where the backward needs them."""
    logits = products
    if gate_logits_ptr is not None:
        logits = load_rows(gate_logits_ptr, t, e, T, E).to(products.dtype)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(products.dtype)[None, :]
    if logits_ptr is not None:
        store_rows(logits, logits_ptr, t, e, T, E)
    return logits


@triton.jit
def gates_of(
    logits,  # (BLOCK_T, BLOCK_E)
    e,  # (BLOCK_E) experts
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """The gates of a tile of tokens: (BLOCK_T, BLOCK_E)."""
    gates = logits
    if TOP_K > 0:
        softmax, kept = softmax_and_kept(logits, e, E, TOP_K, RENORMALIZE)
        gates = zero_dropped(softmax, kept, RENORMALIZE)
    return gates


@triton.jit
def gate_column(gates, e, expert):
    """The gates of one expert, or of one for each token (BLOCK_T, 1): (BLOCK_T, 1)."""
    return tl.sum(tl.where(e[None, :] == expert, gates, 0.0), axis=1)[:, None]


@triton.jit
def blend(
    values_ptr,  # (T, E, R), at the tile's (BLOCK_T, BLOCK_R) elements of expert 0
    mask,  # (BLOCK_T, BLOCK_R)
    gates,  # (BLOCK_T, BLOCK_E)
    e,  # (BLOCK_E) experts
    E: tl.constexpr,
    STEP: tl.constexpr,  # elements from one expert to the next: R, or 0 where all experts share the values
):
    """sum_e gates[t,e] values[t,e,r]: (BLOCK_T, BLOCK_R)."""
    total = tl.zeros(mask.shape, gates.dtype)
    for expert in range(E):
        values = tl.load(values_ptr + expert * STEP, mask=mask, other=0.0).to(gates.dtype)
        total += gate_column(gates, e, expert) * values
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
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """v[t,e,r] = gates[t,e] times h, u[e] or the shared u, as MIXING says."""
    U_STEP: tl.constexpr = R if EXPERTS_OF_A == E else 0  # pyright: ignore[reportAssignmentType]
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (t < T)[:, None] & (r < R)[None, :]
        u_at = u_ptr + t.to(tl.int64)[:, None] * (EXPERTS_OF_A * R) + r[None, :]
        v_at = v_ptr + t.to(tl.int64)[:, None] * (E * R) + r[None, :]
        if MIXING == "blended":
            h = blend(u_at, mask, gates, e, E, U_STEP)
        else:
            h = tl.load(u_at, mask=mask, other=0.0).to(gates.dtype)
        for expert in range(E):
            if MIXING == "per expert":
                h = tl.load(u_at + expert * R, mask=mask, other=0.0).to(gates.dtype)
            v = gate_column(gates, e, expert) * h
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
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The backward of the mix: stores du and v, returns the gates' gradient (BLOCK_T, BLOCK_E).

    If blended, a gate enters twice, through B(t) and through A(t): dgates[e] = <dv[e], h> + <dh, u[e]>. With a shared A the
    second term is the same for all experts, so the backward of the softmax cancels it and it is left out.
    """
    U_STEP: tl.constexpr = R if EXPERTS_OF_A == E else 0  # pyright: ignore[reportAssignmentType]
    dgates = tl.zeros(gates.shape, gates.dtype)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = (t < T)[:, None] & (r < R)[None, :]
        u_at = u_ptr + t.to(tl.int64)[:, None] * (EXPERTS_OF_A * R) + r[None, :]
        of_expert_0 = t.to(tl.int64)[:, None] * (E * R) + r[None, :]
        if MIXING == "blended":
            h = blend(u_at, mask, gates, e, E, U_STEP)
        else:
            h = tl.load(u_at, mask=mask, other=0.0).to(gates.dtype)
        dh = h if MIXING == "per expert" else blend(dv_ptr + of_expert_0, mask, gates, e, E, R)
        for expert in range(E):
            gate = gate_column(gates, e, expert)
            dv = tl.load(dv_ptr + of_expert_0 + expert * R, mask=mask, other=0.0).to(gates.dtype)
            if MIXING == "per expert":
                h = tl.load(u_at + expert * R, mask=mask, other=0.0).to(gates.dtype)
                dh = dv
            dgate = dv * h
            if MIXING == "blended":
                dgate += dh * tl.load(u_at + expert * U_STEP, mask=mask, other=0.0).to(gates.dtype)
            dgates += tl.where(e[None, :] == expert, tl.sum(dgate, axis=1)[:, None], 0.0)
            if du_ptr is not None and EXPERTS_OF_A == E:
                du_at = du_ptr + of_expert_0 + expert * R
                tl.store(du_at, (gate * dh).to(du_ptr.dtype.element_ty), mask=mask)
            if v_ptr is not None:
                v_at = v_ptr + of_expert_0 + expert * R
                tl.store(v_at, (gate * h).to(v_ptr.dtype.element_ty), mask=mask)
        if du_ptr is not None and EXPERTS_OF_A < E:  # the only du is the sum over all experts; "shared a": that is dh
            du = tl.sum(gates, axis=1)[:, None] * dh if MIXING == "blended" else dh
            tl.store(du_ptr + t.to(tl.int64)[:, None] * R + r[None, :], du.to(du_ptr.dtype.element_ty), mask=mask)
    return dgates


@triton.jit
def softmax_bwd(
    softmax,  # (BLOCK_T, BLOCK_E)
    dgates,  # (BLOCK_T, BLOCK_E), 0 for dropped experts, whose softmax need not be 0
):
    """The gradient of the logits: (BLOCK_T, BLOCK_E)."""
    return softmax * (dgates - tl.sum(softmax * dgates, axis=1)[:, None])


@triton.jit
def gate_and_mix_bwd_tile(
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
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All that follows the shrink of dy: recompute the gates, then the backward of the mix and of the softmax."""
    gates = load_rows(logits_ptr, t, e, T, E).to(ACC)
    if TOP_K > 0:
        softmax, kept = softmax_and_kept(gates, e, E, TOP_K, RENORMALIZE)
        gates = zero_dropped(softmax, kept, RENORMALIZE)
    dlogits = mix_bwd_tile(u_ptr, dv_ptr, du_ptr, v_ptr, gates, t, e, T, E, EXPERTS_OF_A, R, MIXING, BLOCK_R)
    if TOP_K > 0:
        dlogits = softmax_bwd(softmax, zero_dropped(dlogits, kept, RENORMALIZE))
    if dlogits_in_ptr is not None:
        dlogits += load_rows(dlogits_in_ptr, t, e, T, E).to(ACC)
    store_rows(dlogits, dlogits_ptr, t, e, T, E)
