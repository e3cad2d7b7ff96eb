# SPDX-License-Identifier: Apache-2.0
"""Device functions that the kernels share, each on one tile of tokens: loads and stores, shrink, expand.

Letters: T tokens, F features (I or O), E experts, R rank. `ER` counts the rows of a factor: E * R, or R where all experts
share one A. Accumulators are fp32 (fp64 for fp64) throughout; `u`, `dv` and `v` are rounded once, to the tokens' dtype.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel of the stream has ended and its results are visible.

    With PDL (programmatic dependent launch) a kernel may begin before that. This is therefore the first statement of every
    kernel that is launched; `host.starts_early` says more.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def let_next_kernel_start(PDL: tl.constexpr):
    """Let the next kernel of the stream begin, up to its own wait, as soon as every program has come here or has ended.

    It stands behind the main loop of a kernel that has more to do then. Neither this call nor the wait may stand in a loop,
    where Triton moves loads across them (triton-lang/triton#11905).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def shrink_tile(
    rows_ptr,  # (T, F)
    stride_t,  # of rows
    factor_ptr,  # (ER, F)
    gate_ptr,  # (E, F) or None
    t,  # (BLOCK_T) tokens
    er,  # (BLOCK_ER) rows of the factor
    e,  # (BLOCK_E) experts
    f_from,  # the sum runs over the features from f_from to f_to; f_to may exceed F
    f_to,
    T,
    F,
    ER,
    E: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """rows factor^T (BLOCK_T, BLOCK_ER) and rows gate^T (BLOCK_T, BLOCK_E); the rows are loaded once."""
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
    parts_ptr,  # (SPLITS, T, C), partial sums
    t,  # (BLOCK_T) tokens
    c,  # (BLOCK_C) columns
    T,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The partial sums added up in their order: (BLOCK_T, BLOCK_C)."""
    total = load_rows(parts_ptr, t, c, T, C)
    for split in range(1, SPLITS):
        total += load_rows(parts_ptr + tl.cast(split, tl.int64) * T * C, t, c, T, C)
    return total


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
