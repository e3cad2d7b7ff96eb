# SPDX-License-Identifier: Apache-2.0
"""Kernels for several mixtures that read the same x: one shrink for all of them, a mix and an expand for those of one kind.

Programs of one launch work on different blocks. A block's numbers come from a table on the device, so that layouts with the
same sizes share their machine code; as constants of the kernels they would need a compilation for each layout.

Where tokens have groups, a program leaves out the tokens of other groups: they take the number T, which every mask excludes.
So nothing that belongs to a foreign block is multiplied with them or added to them, and a program without tokens ends early.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.cost import ceil_div
from lmoe_kernels.backends.triton.expand import add_product
from lmoe_kernels.backends.triton.gates import gates_of
from lmoe_kernels.backends.triton.mix import Constants
from lmoe_kernels.backends.triton.plans import Tile
from lmoe_kernels.backends.triton.tiles import let_next_kernel_start, load_rows, shrink_tile, wait_for_previous_kernel
from lmoe_kernels.options import StackedFactors, TokenGroups


class Table(NamedTuple):
    """The blocks of one launch, as its kernels read them."""

    places: Tensor  # (blocks, 6) int64: group, first row of A, first expert, first element of B, first column of y, O
    scalings: Tensor  # (blocks), fp32 (fp64 for fp64)
    alignment: int  # a power of two that divides the last three numbers of every block, at most 16
    most_features: int  # the largest O


def stacked_shrink_fwd(
    x: Tensor,  # (T, I), with one feature or more
    factors: StackedFactors,
    groups: TokenGroups | None,
    row_groups: Tensor,  # (rows of A and of the gates) int64, the group of each row's block
    splits: int,
    tile: Tile,
    *,
    gate_with_a: bool,  # whether the programs of A compute the product with the gates too; there is a gate then, no groups
) -> Tensor:
    """Partial sums of x A^T and x gate_weight^T, next to each other: (splits, T, rows of A and of the gates)."""
    (T, I), lora_a, gate = x.shape, factors.lora_a, factors.gate_weight  # noqa: E741
    rows, rows_of_gate = lora_a.shape[0], 0 if gate is None else gate.shape[0]
    parts = x.new_empty(splits, T, rows + rows_of_gate, dtype=host.accumulator(x))
    features_of_split = ceil_div(I, splits * tile.F) * tile.F
    tiles_of_rows = ceil_div(rows, tile.ER) + (0 if gate_with_a else ceil_div(rows_of_gate, tile.ER))
    host.launch(
        _stacked_shrink_fwd_kernel, (tile.tiles_of(T), tiles_of_rows, splits),
        x, x.stride(0), lora_a, gate, None if groups is None else groups.group, row_groups, parts, T, I, features_of_split,
        ROWS_OF_A=rows, ROWS_OF_GATE=rows_of_gate, GATE_WITH_A=gate_with_a, **host.dot_constants(x), tile=tile,
    )  # fmt: skip
    return parts


def stacked_mix_fwd(
    parts: Tensor,  # (splits, T, rows of A and of the gates)
    factors: StackedFactors,
    groups: TokenGroups | None,
    table: Table,
    v: Tensor,  # (blocks, T, E, R), written, but for tokens of other groups
    constants: Constants,
    tile: Tile,
) -> None:
    """Add up the partial sums and blend the experts of every token, for all blocks of the table."""
    splits, T, columns = parts.shape
    logits, rows_of_a = factors.gate_logits, factors.lora_a.shape[0]
    host.launch(
        _stacked_mix_fwd_kernel, (tile.tiles_of(T), len(table.places)),
        parts, factors.gate_bias, logits, 0 if logits is None else logits.stride(0),
        None if groups is None else groups.group, table.places, v, T,
        COLUMNS=columns, ROWS_OF_A=rows_of_a, SPLITS=splits, ACC=host.dot_constants(v)["ACC"], **constants, tile=tile,
    )  # fmt: skip


def stacked_expand_fwd(
    v: Tensor,  # (blocks, T, E, R)
    lora_b: Tensor,  # (sum of E R O)
    groups: TokenGroups | None,
    table: Table,
    y: Tensor,  # (T, N), changed
    tile: Tile,
    steps: int,  # blocks of features that a program walks over
) -> None:
    """y[:, columns] += scaling * token_scale * v B, for all blocks of the table, no two of which share elements of y."""
    blocks, T, E, R = v.shape
    group, scale = (None, None) if groups is None else groups
    chunks = ceil_div(ceil_div(table.most_features, tile.F), steps)
    host.launch(
        _stacked_expand_fwd_kernel, (tile.tiles_of(T) * chunks, blocks),
        v, lora_b, group, scale, table.places, table.scalings, y, y.stride(0), T, chunks, steps,
        ER=E * R, ALIGNMENT=table.alignment, **host.dot_constants(v), tile=tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _stacked_shrink_fwd_kernel(
    x_ptr, stride_t,  # (T, F)
    a_ptr,  # (ROWS_OF_A, F)
    gate_ptr,  # (ROWS_OF_GATE, F) or None
    group_ptr,  # (T) or None
    row_groups_ptr,  # (ROWS_OF_A + ROWS_OF_GATE)
    parts_ptr,  # (SPLITS, T, ROWS_OF_A + ROWS_OF_GATE), written
    T,
    F,
    features_of_split,  # a multiple of BLOCK_F
    ROWS_OF_A: tl.constexpr,
    ROWS_OF_GATE: tl.constexpr,
    GATE_WITH_A: tl.constexpr,  # whether the programs of A have the gates too; else these have programs of their own
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The partial sum of one tile of tokens over one split of the features, for some rows of A or of the gates.

    Where tokens have groups, those are left out whose group is not between the first and the last one of the rows.
    """
    wait_for_previous_kernel(PDL)
    COLUMNS: tl.constexpr = ROWS_OF_A + ROWS_OF_GATE  # pyright: ignore[reportAssignmentType]
    TILES_OF_A: tl.constexpr = (ROWS_OF_A + BLOCK_ER - 1) // BLOCK_ER  # pyright: ignore[reportAssignmentType]
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, rows, column = tl.program_id(1) * BLOCK_ER + tl.arange(0, BLOCK_ER), ROWS_OF_A, 0
    e = tl.arange(0, BLOCK_E)  # rows of the gates that come with rows of A
    factor_ptr = a_ptr
    if gate_ptr is not None and not GATE_WITH_A:
        of_gate = tl.program_id(1) >= TILES_OF_A
        row -= tl.where(of_gate, TILES_OF_A * BLOCK_ER, 0)
        rows, column = tl.where(of_gate, ROWS_OF_GATE, ROWS_OF_A), tl.where(of_gate, ROWS_OF_A, 0)
        if of_gate:
            factor_ptr = gate_ptr
    needed = True
    if group_ptr is not None:
        # A range of groups: to compare each token with each row would spill, on gfx942 and on sm_90.
        of_rows = tl.load(row_groups_ptr + column + tl.minimum(row, rows - 1))
        group = tl.load(group_ptr + t, mask=t < T, other=0)
        t = tl.where((group >= tl.min(of_rows, axis=0)) & (group <= tl.max(of_rows, axis=0)), t, T)
        needed = tl.min(t, axis=0) < T
    if needed:
        split = tl.program_id(2)
        f_from = split * features_of_split
        f_to = tl.minimum(F, f_from + features_of_split)
        if x_ptr.dtype.element_ty.primitive_bitwidth == 16:  # fp32 has no wgmma
            tl.assume(f_to > f_from)  # else Triton 3.6 and its ptxas serialise wgmma (warning C7515)
        with_ptr = gate_ptr if GATE_WITH_A else None
        part, gate_part = shrink_tile(
            x_ptr, stride_t, factor_ptr, with_ptr, t, row, e, f_from, f_to, T, F, rows, ROWS_OF_GATE, ACC, PRECISION, BLOCK_F
        )
        let_next_kernel_start(PDL)
        out = parts_ptr + split.to(tl.int64) * T * COLUMNS + column + t.to(tl.int64)[:, None] * COLUMNS
        tl.store(out + row[None, :], part, mask=(t < T)[:, None] & (row < rows)[None, :])
        if GATE_WITH_A and tl.program_id(1) == 0:
            of_gate = (t < T)[:, None] & (e < ROWS_OF_GATE)[None, :]
            tl.store(out + ROWS_OF_A + e[None, :], gate_part, mask=of_gate)


@triton.jit(do_not_specialize=["T"])
def _stacked_mix_fwd_kernel(
    parts_ptr,  # (SPLITS, T, COLUMNS)
    gate_bias_ptr,  # (sum of E) or None
    gate_logits_ptr, stride_t,  # (T, sum of E), in place of the last columns of parts; or None
    group_ptr,  # (T) or None
    places_ptr,  # (blocks, 6)
    v_ptr,  # (blocks, T, E, R), written
    T,
    COLUMNS: tl.constexpr,
    ROWS_OF_A: tl.constexpr,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    EXPERTS_OF_A: tl.constexpr,
    R: tl.constexpr,
    MIXING: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The mix of one block on a tile of tokens, straight from the partial sums: u is not rounded.

    The tiles have a dimension for the experts, which needs no loop over them: all loads of a tile are under way at once.
    """
    wait_for_previous_kernel(PDL)
    U_STEP: tl.constexpr = R if EXPERTS_OF_A == E else 0  # pyright: ignore[reportAssignmentType]
    block = tl.program_id(1)
    place_ptr = places_ptr + block * 6
    first_row, first_expert = tl.load(place_ptr + 1), tl.load(place_ptr + 2)
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    t = _tokens_of_block(group_ptr, place_ptr, t, T)
    token = t.to(tl.int64)
    of_gate = (t < T)[:, None] & (e < E)[None, :]
    expert = first_expert + e
    if gate_logits_ptr is not None:
        logits_at = gate_logits_ptr + token[:, None] * stride_t + expert[None, :]
        logits = tl.load(logits_at, mask=of_gate, other=0.0).to(ACC)
    else:
        logits = _sum_splits(parts_ptr + token[:, None] * COLUMNS + ROWS_OF_A + expert[None, :], of_gate, T, COLUMNS, SPLITS)
    if gate_bias_ptr is not None:
        logits += tl.load(gate_bias_ptr + expert, mask=e < E, other=0.0).to(ACC)[None, :]
    gates = gates_of(logits, e, E, TOP_K, RENORMALIZE)[:, :, None]
    v_ptr += block.to(tl.int64) * T * E * R
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = of_gate[:, :, None] & (r < R)[None, None, :]
        u_at = parts_ptr + first_row + token[:, None, None] * COLUMNS + e[None, :, None] * U_STEP + r[None, None, :]
        h = _sum_splits(u_at, mask, T, COLUMNS, SPLITS)
        if MIXING == "blended":
            h = tl.sum(gates * h, axis=1)[:, None, :]
        v_at = v_ptr + token[:, None, None] * (E * R) + e[None, :, None] * R + r[None, None, :]
        tl.store(v_at, (gates * h).to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _stacked_expand_fwd_kernel(
    v_ptr,  # (blocks, T, ER)
    b_ptr,  # (sum of ER O)
    group_ptr,  # (T) or None
    scale_ptr,  # (T) or None
    places_ptr,  # (blocks, 6)
    scalings_ptr,  # (blocks)
    y_ptr, stride_t,  # (T, N), changed
    T,
    chunks,  # programs for a tile of tokens, as many as the widest block needs
    steps,  # blocks of features that a program walks over
    ER: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_ER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of tokens and a chunk of one block's columns of y."""
    wait_for_previous_kernel(PDL)
    block, first = tl.program_id(1), tl.program_id(0) % chunks * steps
    place_ptr = places_ptr + block * 6
    # Without these hints no load of B or y would take more than one number.
    b_ptr += tl.multiple_of(tl.load(place_ptr + 3), ALIGNMENT)
    y_ptr += tl.multiple_of(tl.load(place_ptr + 4), ALIGNMENT)
    F = tl.multiple_of(tl.load(place_ptr + 5).to(tl.int32), ALIGNMENT)
    t = tl.program_id(0) // chunks * BLOCK_T + tl.arange(0, BLOCK_T)
    needed = first * BLOCK_F < F
    if group_ptr is not None:
        t = _tokens_of_block(group_ptr, place_ptr, t, T)
        needed = needed & (tl.min(t, axis=0) < T)
    if needed:
        er = tl.arange(0, BLOCK_ER)
        v_ptr += block.to(tl.int64) * T * ER
        v = load_rows(v_ptr, t, er, T, ER) if BLOCK_ER >= ER else None
        factor = tl.load(scalings_ptr + block)
        if scale_ptr is not None:
            factor = factor * tl.load(scale_ptr + t, mask=t < T, other=0.0)[:, None]
        for step in range(steps):
            f = (first + step) * BLOCK_F + tl.arange(0, BLOCK_F)
            acc = add_product(tl.zeros((BLOCK_T, BLOCK_F), ACC), v, v_ptr, b_ptr, t, er, f, T, F, ER, PRECISION)
            mask = (t < T)[:, None] & (f < F)[None, :]
            y_at = y_ptr + t.to(tl.int64)[:, None] * stride_t + f[None, :]
            y = tl.load(y_at, mask=mask, other=0.0).to(ACC) + acc * factor
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tokens_of_block(
    group_ptr,  # (T) or None
    place_ptr,  # the numbers of the block
    t,  # (BLOCK_T) tokens
    T,
):
    """The tokens of a tile, and T in place of those that the block is not added to: (BLOCK_T)."""
    if group_ptr is not None:
        group = tl.load(group_ptr + t, mask=t < T, other=0)
        t = tl.where(group == tl.load(place_ptr), t, T)
    return t


@triton.jit
def _sum_splits(
    part_at,  # pointers to elements of the first of the partial sums (SPLITS, T, COLUMNS)
    mask,
    T,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The partial sums of these elements added up in their order."""
    total = tl.load(part_at, mask=mask, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(part_at + tl.cast(split, tl.int64) * T * COLUMNS, mask=mask, other=0.0)
    return total
