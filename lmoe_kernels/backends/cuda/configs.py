"""Sizes that the launchers are given: pure functions of the problem. None of them is measured yet; each says what it expects."""

BLOCK_T, BLOCK_C, BLOCK_F = 64, 64, 128  # of csrc/cuda/forward.cuh


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
