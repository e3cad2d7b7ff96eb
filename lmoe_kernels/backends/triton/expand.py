# SPDX-License-Identifier: Apache-2.0
"""Expand: multiply few columns with a factor, up to F features. In the forward v with B, in the backward du with A.

`expand_fwd` can add a second product, the backward's dlogits with gate_weight. `grouped_expand_fwd` uses for each token only
the experts that it keeps.

A program walks over a chunk of features, and holds its tokens' columns meanwhile: v is loaded once for each chunk, and the
factor's next blocks while the last one is multiplied and written. Programs that follow each other have the same tokens. All
but the first of them then find v in the L2, and together they write whole rows of the result. In the other order every chunk
would read all of v again from memory, where the rows written meanwhile have displaced it: 6 E R bytes a token with four
chunks, 768 with E R = 128, where a row of 4096 features in bf16 is 8192.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.plans import Tile
from lmoe_kernels.backends.triton.route import tile_of_group
from lmoe_kernels.backends.triton.tiles import expand_tile, load_rows, wait_for_previous_kernel, write_tile


def expand_fwd(
    v: Tensor,  # (T, E, R)
    factor: Tensor,  # (E, R, F)
    out: Tensor,  # (T, F), written
    tile: Tile,
    *,
    dlogits: Tensor | None = None,  # (T, E)
    gate_weight: Tensor | None = None,  # (E, F), where dlogits is given
    base: Tensor | None = None,  # (F) or (T, F)
    scaling: float = 1.0,
) -> None:
    """out = base + scaling * (v factor + dlogits gate_weight)."""
    T, (experts, R, F) = out.shape[0], factor.shape
    chunks, steps = tile.chunks(F)
    E = 1 if gate_weight is None else gate_weight.shape[0]
    host.launch(
        _expand_fwd_kernel, (tile.tiles_of(T) * chunks,),
        v, factor, dlogits, gate_weight, base, host.row_stride(base), out, scaling, T, F, steps,
        ER=experts * R, E=E, **host.dot_constants(v), tile=tile,
    )  # fmt: skip


def grouped_expand_fwd(
    v: Tensor,  # (T, K, R)
    factor: Tensor,  # (E, R, F)
    route: Tensor,  # (K, 2 T + E + 1)
    out: Tensor,  # (T, F), written
    tile: Tile,
    *,
    base: Tensor | None = None,  # (F) or (T, F), which may be out itself
    scaling: float = 1.0,
) -> None:
    """out[t] = base[t] + scaling * sum_slots v[t, slot] factor[e], where e is the expert of the slot.

    The launch of each slot adds to what the one before wrote. Each token comes once in a launch: no atomics are needed, and
    results are deterministic.
    """
    E, R, F = factor.shape
    K, T = route.shape[0], out.shape[0]
    chunks, steps = tile.chunks(F)
    for slot in range(K):
        host.launch(
            _grouped_expand_fwd_kernel, ((tile.tiles_of(T) + E) * chunks,),
            v, factor, route, base, host.row_stride(base), out, scaling, slot, T, F, steps,
            E=E, R=R, TOP_K=K, **host.dot_constants(v), tile=tile,
        )  # fmt: skip
        base = out


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
    steps,  # blocks of features that a program walks over
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
    """A tile of tokens and a chunk of features of base + scaling * (v factor + dlogits gate)."""
    wait_for_previous_kernel(PDL)
    chunks = tl.cdiv(tl.cdiv(F, BLOCK_F), steps)
    t = tl.program_id(0) // chunks * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(0) % chunks * steps
    er, e = tl.arange(0, BLOCK_ER), tl.arange(0, BLOCK_E)
    v = load_rows(v_ptr, t, er, T, ER) if BLOCK_ER >= ER else None
    dlogits = load_rows(dlogits_ptr, t, e, T, E) if dlogits_ptr is not None and BLOCK_E >= E else None
    for step in range(steps):
        f = (first + step) * BLOCK_F + tl.arange(0, BLOCK_F)
        acc = tl.zeros((BLOCK_T, BLOCK_F), ACC)
        acc = add_product(acc, v, v_ptr, factor_ptr, t, er, f, T, F, ER, PRECISION)
        if dlogits_ptr is not None:
            acc = add_product(acc, dlogits, dlogits_ptr, gate_ptr, t, e, f, T, F, E, PRECISION)
        write_tile(acc * scaling, base_ptr, base_stride_t, out_ptr, t, f, T, F)


@triton.jit
def add_product(
    acc,  # (BLOCK_T, BLOCK_F)
    rows,  # (BLOCK_T, BLOCK_C), or None where a block does not have all columns
    rows_ptr,  # (T, C)
    factor_ptr,  # (C, F)
    t,  # (BLOCK_T) tokens
    c,  # (BLOCK_C) columns
    f,  # (BLOCK_F) features
    T,
    F,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + rows factor: (BLOCK_T, BLOCK_F). More columns than a block has are loaded here, block by block."""
    if rows is not None:
        acc = expand_tile(rows, factor_ptr, acc, c, f, F, C, PRECISION)
    else:
        for start in range(0, C, c.shape[0]):
            part = load_rows(rows_ptr, t, start + c, T, C)
            acc = expand_tile(part, factor_ptr, acc, start + c, f, F, C, PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "slot"])
def _grouped_expand_fwd_kernel(
    v_ptr,  # (T, K, R)
    factor_ptr,  # (E, R, F)
    route_ptr,  # (K, 2 T + E + 1)
    base_ptr, base_stride_t,  # (T, F), (F), or None; the output itself from the second slot on
    out_ptr,  # (T, F), written
    scaling,
    slot,
    T,
    F,
    steps,  # blocks of features that a program walks over
    E: tl.constexpr,
    R: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of features of what one slot adds to a tile of one expert's tokens."""
    wait_for_previous_kernel(PDL)
    e, chunks = tl.arange(0, BLOCK_E), tl.cdiv(tl.cdiv(F, BLOCK_F), steps)
    expert, t = tile_of_group(route_ptr, slot, tl.program_id(0) // chunks, e, T, E, BLOCK_T)
    if expert < E:
        r = tl.arange(0, BLOCK_ER)
        mask = (t < T)[:, None] & (r < R)[None, :]
        row = t.to(tl.int64) * TOP_K + slot
        v = tl.load(v_ptr + row[:, None] * R + r[None, :], mask=mask, other=0.0)
        factor = factor_ptr + expert.to(tl.int64) * R * F
        for step in range(steps):
            f = (tl.program_id(0) % chunks * steps + step) * BLOCK_F + tl.arange(0, BLOCK_F)
            acc = expand_tile(v, factor, tl.zeros((BLOCK_T, BLOCK_F), ACC), r, f, F, R, PRECISION)
            write_tile(acc * scaling, base_ptr, base_stride_t, out_ptr, t, f, T, F)
