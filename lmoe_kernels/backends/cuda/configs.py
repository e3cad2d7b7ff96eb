"""Sizes that the launchers are given: pure functions of the problem. None is measured yet; each says what it expects."""

from dataclasses import dataclass
from functools import cache

BLOCK_T, BLOCK_C, BLOCK_F = 64, 64, 128  # of csrc/cuda/stages.cuh
STEP_BYTES = 64  # of a row of an operand, in one step of a product: csrc/cuda/tiles.cuh
ONE_PASS_STAGES = 59392  # bytes that the products of the one-pass forward take: csrc/cuda/forward.cuh
ONE_PASS_SMEM = 99 << 10  # what every GPU from sm_80 on gives to one block
DECODE_TOKENS = 64
DECODE_WARPS, TOKEN_GROUP, WARP_FEATURES = 8, 8, 256  # of csrc/cuda/decode.cuh
DECODE_SMEM = 96 << 10  # what every GPU from sm_80 on gives to one block, less what the system keeps


def padded(columns: int) -> int:
    """Row stride of a workspace: whole 16-byte vectors in every dtype."""
    return (columns + 7) // 8 * 8


def wgrad_splits(tokens: int, coefficients: int, features: int) -> int:
    """Into how many parts wgrad cuts the sum over the tokens.

    Expected: enough blocks for two on each of some 132 processors, and at least 512 tokens in each part, since every part
    writes and reads its fp32 sums once.
    """
    blocks = -(-coefficients // BLOCK_C) * -(-features // BLOCK_F)
    return max(1, min(264 // max(blocks, 1), tokens // 512))


def shrink_parts(tokens: int, features: int, processors: int) -> int:
    """Into how many parts shrink cuts the sum over the features, x's in the forward and dy's in the backward.

    A block owns 64 tokens, so that few tokens leave most processors without one. Expected: a block on each of them is worth
    the parts' fp32 sums, which cost 8 bytes a coefficient, token and part against 2 a feature and token (E = 8, R = 16,
    4096 features: 13 % a part, all of it within the L2 where so few tokens are), and a launch that adds them up, four tokens
    a block: of a tile, the last block to be done would have to read 35 KB of every part alone. A part of less than 512
    features, 16 steps of the pipeline, costs more to add up than it saves: unsplit, 64 tokens of 4096 features are 128 steps
    one after the other, in eight parts 16.
    """
    return max(1, min(_parts_that_fill(tokens, processors), features // 512))


def _parts_that_fill(tokens: int, processors: int) -> int:
    """Processors for each tile of tokens, to the nearest: one where tiles fill more than two thirds of them."""
    tiles = max(1, -(-tokens // BLOCK_T))
    return (2 * processors + tiles) // (2 * tiles)


def one_pass_smem(tokens: int, experts: int, rank: int, size: int, processors: int) -> int:
    """Bytes of shared memory of a block of the one-pass forward, or 0 where the forward runs stage by stage.

    One pass spares v (in bf16 2 E R bytes a token written, and read again for every 128 columns of y: at E = 8, R = 16 a
    third of what expand draws from the L2), a launch or two, and three workspaces. Expected: it pays where tiles of tokens
    fill the chip, because a block does all of a tile's work from x to y. Up to two thirds of the processors the stages win:
    shrink in parts, and expand with a block for every 128 columns. At E = 8, R = 16 in bf16 a block takes 78 KB: two fit on
    the 164 KB of a processor of sm_80 and the 228 KB of sm_90, one on the 100 KB of sm_120.
    """
    if _parts_that_fill(tokens, processors) > 1:
        return 0
    v = BLOCK_T * _multiple(experts * rank * size, STEP_BYTES)
    smem = ONE_PASS_STAGES + v + 2 * BLOCK_T * experts * 4  # and fp32 logits and gates
    return smem if smem <= ONE_PASS_SMEM else 0


@dataclass(frozen=True)
class DecodePlan:
    """How the one-launch forward of few tokens is cut: see csrc/cuda/decode.cuh."""

    blocks: int
    chunk: int  # features of x in one partial sum
    chunks: int
    column_tile: int  # columns of y that a block makes at a time
    smem: int  # bytes


@cache
def decode_plan(
    tokens: int, in_features: int, out_features: int, experts: int, experts_of_a: int, rank: int, has_gate: bool, size: int,
    processors: int,
) -> DecodePlan | None:  # fmt: skip
    """The plan for one block on each processor, or None where the general forward has to do it.

    Expected: every block gets one tile of columns, so that all of lora_b is on its way before the grid meets; x is cut into
    as few chunks as keep all warps busy, since each chunk is one more sum to add.
    """
    if tokens > DECODE_TOKENS or out_features == 0:
        return None
    rows = experts_of_a * rank + (experts if has_gate else 0)
    column_tile = padded(max(16, -(-out_features // processors)))
    while (smem := _decode_smem(tokens, experts, experts_of_a, rank, column_tile, size)) > DECODE_SMEM:
        if column_tile <= 16:
            return None
        column_tile = padded(column_tile // 2)
    chunk = _multiple(max(1, -(-in_features * rows // (processors * DECODE_WARPS))), WARP_FEATURES)
    chunks = max(1, -(-in_features // chunk))
    blocks = max(-(-out_features // column_tile), -(-rows * chunks // DECODE_WARPS))
    return DecodePlan(min(blocks, processors), chunk, chunks, column_tile, smem)


def _decode_smem(tokens: int, experts: int, experts_of_a: int, rank: int, column_tile: int, size: int) -> int:
    """The bytes of DecodeLayout."""
    arrays = (
        experts * rank * column_tile * size,  # lora_b's columns
        tokens * experts_of_a * rank * size,  # u
        tokens * experts * rank * size,  # v
        tokens * experts * 4,  # logits
        tokens * experts * 4,  # gates
    )
    return sum(_multiple(size, 16) for size in arrays) + DECODE_WARPS * TOKEN_GROUP * column_tile * 4


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of
