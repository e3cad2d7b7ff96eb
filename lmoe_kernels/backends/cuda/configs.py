"""Sizes that the launchers are given: pure functions of the problem. None is measured yet; each says what it expects."""

from dataclasses import dataclass
from functools import cache

BLOCK_C, BLOCK_F = 64, 128  # of csrc/cuda/forward.cuh
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


@dataclass(frozen=True)
class DecodePlan:
    """How the one-launch forward is cut: see csrc/cuda/decode.cuh."""

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
