# SPDX-License-Identifier: Apache-2.0
"""Plans and workspace sizes of the launchers: pure functions of the problem. They are expected to be good, not measured."""

from functools import cache
from typing import NamedTuple

from lmoe_kernels.backends.cuda.extension import Device

BLOCK_T, BLOCK_C, BLOCK_F = 64, 64, 128  # as in csrc/cuda/stages.cuh
STEP_BYTES = 64  # bytes of an operand's row in one pipeline step: csrc/cuda/tiles.cuh
ONE_PASS_STAGES = 59392  # shared memory of the one-pass forward's products, in bytes: csrc/cuda/forward.cuh
ONE_PASS_SMEM = 99 << 10  # every GPU from sm_80 on allows a block this much
STAGES_SMEM = 57344  # the largest kernel of the other forward and of the backward, in bytes: csrc/cuda/stages.cuh
DECODE_TOKENS = 16  # at most, as in csrc/cuda/decode.cuh, like the next line
DECODE_WARPS, WARP_FEATURES, BATCH_FEATURES = 8, 256, 1024  # features of one load of a warp; of all that are on the way
DECODE_SMEM = 96 << 10  # bytes: as ONE_PASS_SMEM, less a reserve for what the system keeps


def ceil_div(value: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-value // divisor)


def padded(columns: int) -> int:
    """Row stride of a workspace: whole 16-byte vectors in every dtype."""
    return _multiple(columns, 8)


def wgrad_splits(tokens: int, coefficients: int, features: int) -> int:
    """Split-K factor of wgrad, which sums over the tokens.

    Expected: enough blocks for two on each of about 132 processors, and at least 512 tokens in each part, since the partial
    sums of every part are written and read once in fp32.
    """
    blocks = ceil_div(coefficients, BLOCK_C) * ceil_div(features, BLOCK_F)
    return max(1, min(264 // max(blocks, 1), tokens // 512))


def shrink_parts(tokens: int, features: int, processors: int) -> int:
    """Split-K factor of shrink, which sums over the features of x in the forward and of dy in the backward.

    A block computes 64 tokens, so few tokens leave most processors idle. Expected: a block on each of them is worth the
    partial sums, 8 bytes for each column, token and part against 2 for each feature and token (13 % a part at E = 8, R = 16
    and 4096 features, and in the L2 with so few tokens), and worth a second kernel that reduces them, four tokens a block.
    Reducing them in the last block of each tile instead would make that block alone read 35 KB of every part. A part of
    less than 512 features, 16 pipeline steps, costs more to reduce than it saves: 64 tokens of 4096 features take 128 steps
    in sequence unsplit, and 16 in eight parts.
    """
    return max(1, min(_parts_that_fill(tokens, processors), features // 512))


def _parts_that_fill(tokens: int, processors: int) -> int:
    """Processors for each tile of tokens, rounded: one where tiles fill more than two thirds of the processors."""
    tiles = max(1, ceil_div(tokens, BLOCK_T))
    return (2 * processors + tiles) // (2 * tiles)


def one_pass_smem(tokens: int, experts: int, rank: int, size: int, processors: int) -> int:
    """Shared memory in bytes of a block of the one-pass forward, or 0 where the forward runs stage by stage.

    One pass saves the traffic of v (in bf16 2 E R bytes a token, written once and read for every 128 columns of y: at E = 8,
    R = 16 a third of what expand reads from the L2), one or two launches, and three workspaces. Expected: it is faster where
    tiles of tokens fill the GPU, because one block does all the work of a tile, from x to y. With tiles for up to two thirds
    of the processors the stages are faster: shrink is split, and expand has a block for every 128 columns. At E = 8, R = 16
    in bf16 a block takes 78 KB: two fit the 164 KB of a processor of sm_80 and the 228 KB of sm_90, one fits the 100 KB of
    sm_120.
    """
    if _parts_that_fill(tokens, processors) > 1:
        return 0
    v = BLOCK_T * _multiple(experts * rank * size, STEP_BYTES)
    smem = ONE_PASS_STAGES + v + 2 * BLOCK_T * experts * 4  # the last term: logits and gates in fp32
    return smem if smem <= ONE_PASS_SMEM else 0


class DecodePlan(NamedTuple):
    """How the one-launch forward of few tokens is divided among blocks: see csrc/cuda/decode.cuh."""

    blocks: int
    chunk: int  # features of x that a warp sums over
    chunks: int  # warps of a block that share the features of a row of [lora_a; gate_weight]
    column_tile: int  # columns of y that a block computes at a time
    smem: int  # bytes


@cache
def decode_plan(
    tokens: int, in_features: int, out_features: int, experts: int, experts_of_a: int, rank: int, has_gate: bool, size: int,
    device: Device,
) -> DecodePlan | None:  # fmt: skip
    """The plan for one block on each processor, or None where the other paths must take the call.

    A device without cooperative launches has no barrier of the grid, so decode cannot run there.

    Expected: every block gets one tile of columns, so that the copies of all of lora_b start before the grid's barrier.
    """
    if tokens > DECODE_TOKENS or out_features == 0 or not device.cooperative:
        return None
    processors, most = device.processors, min(DECODE_SMEM, device.shared_memory_a_block)
    columns = experts_of_a * rank + (experts if has_gate else 0)  # of u and the logits
    column_tile = padded(max(16, ceil_div(out_features, processors)))
    while (smem := _decode_smem(tokens, experts, experts_of_a, rank, column_tile, size)) > most:
        if column_tile <= 16:
            return None
        column_tile = padded(column_tile // 2)
    chunks = _chunks(in_features, columns, processors)
    chunk = _multiple(max(1, ceil_div(in_features, chunks)), WARP_FEATURES)
    blocks = max(ceil_div(out_features, column_tile), ceil_div(columns * chunks, DECODE_WARPS))
    return DecodePlan(min(blocks, processors), chunk, chunks, column_tile, smem)


def _chunks(in_features: int, columns: int, processors: int) -> int:
    """The warps that share the features of a row: 1, 2, 4 or 8, since the warps of a block add up their sums.

    Expected: few tokens wait for memory, so as many warps as there are share the rows, as long as all rows are computed at
    the same time and each warp still has a full batch of loads on the way. A warp with less would wait as long for them.
    At E = 8, R = 16 and 4096 features the 136 rows are shared by four warps each, on 68 of an H100's 132 processors.
    """
    at_once = processors * DECODE_WARPS
    shared = [n for n in (2, 4, 8) if columns * n <= at_once and in_features >= n * BATCH_FEATURES]
    return max(shared, default=1)


def _decode_smem(tokens: int, experts: int, experts_of_a: int, rank: int, column_tile: int, size: int) -> int:
    """The bytes of DecodeLayout in csrc/cuda/decode.cuh."""
    arrays = (
        experts * rank * column_tile * size,  # lora_b's columns
        tokens * experts_of_a * rank * size,  # u
        tokens * experts * rank * size,  # v
        tokens * experts * 4,  # logits
        tokens * experts * 4,  # gates
    )
    group = 1 if tokens == 1 else 4 if tokens <= 4 else 8  # tokens that a thread computes at a time
    return sum(_multiple(size, 16) for size in arrays) + DECODE_WARPS * group * column_tile * 4


def _multiple(value: int, of: int) -> int:
    return ceil_div(value, of) * of
