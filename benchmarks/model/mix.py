"""The mix stage, token by token. Its loops run as often as sizes say, so its cycles are formulas, and all are guesses."""

from typing import NamedTuple

from benchmarks.model.chips import L2_LATENCY, MIX_EXPERT, MIX_RANK, SOFTMAX, TEAM_SOFTMAX
from benchmarks.model.cubins import constant
from benchmarks.model.estimate import ceil_div

WIDTH = 4  # columns that a lane loads together: csrc/cuda/mix.cu, where addresses and sizes allow it
TOGETHER = 4  # partial sums of a column that are on their way at the same time: csrc/cuda/mix.cuh


def of_a_block(tokens: int, experts: int, rank: int, threads: int) -> int:
    """Cycles of softmax and mix of a block's tokens, with all they need in shared memory."""
    return SOFTMAX + ceil_div(tokens * rank, threads) * (MIX_RANK + experts * MIX_EXPERT)


class Launch(NamedTuple):
    """How csrc/cuda/mix.cu divides the tokens: some lanes of a warp, a team, compute one."""

    lanes: int  # of a team
    rank_lanes: int  # of them, that share the ranks of an expert
    warps: int  # of a block
    shared: int  # bytes of a block; 0 where the numbers of a token are too many to keep
    tokens: int  # of a block

    @classmethod
    def of(cls, columns: int, experts: int, rank: int, backward: bool, size: int) -> "Launch":
        """For the partial sums of so many columns."""
        lanes = 1
        while lanes < 32 and (lanes < experts or 4 * WIDTH * lanes < columns):
            lanes *= 2
        rank_lanes = 1
        while rank_lanes < lanes and WIDTH * rank_lanes < rank:
            rank_lanes *= 2
        kept = 2 if backward else 1  # rows of gates and of E R elements: in the backward of their gradients, too
        of_token = kept * _up(experts * 4) + _up(kept * experts * rank * size)
        of_warp, warps, most = of_token * 32 // lanes, constant("MIX_WARPS"), constant("MIX_SMEM")
        if 2 * of_warp > most:
            return cls(lanes, rank_lanes, warps, 0, warps * 32 // lanes)
        while warps * of_warp > most:
            warps //= 2
        return cls(lanes, rank_lanes, warps, warps * of_warp, warps * 32 // lanes)

    def cycles(self, columns: int, experts: int, rank: int, parts: int, backward: bool) -> int:
        """Of a team: the partial sums, two vectors of each lane at a time; softmax; ranks and experts."""
        sums = ceil_div(columns, 2 * WIDTH * self.lanes) * ceil_div(parts, TOGETHER) * L2_LATENCY
        of_group = ceil_div(experts, self.lanes // self.rank_lanes)  # experts
        mixed = ceil_div(rank, WIDTH * self.rank_lanes) * (MIX_RANK + 2 * of_group * MIX_EXPERT)
        return sums + TEAM_SOFTMAX + mixed + (TEAM_SOFTMAX + mixed if backward else 0)


def _up(count: int) -> int:
    """Whole vectors of 16 bytes."""
    return ceil_div(count, 16) * 16
