# SPDX-License-Identifier: Apache-2.0
"""Plans and workspace sizes of the launchers: pure functions of the problem.

They follow a model, `python -m benchmarks.model`, and no other plan was timed. In a CUDA graph on an H200 the kernels take
1.2 to 1.6 times as long as that model says (nvcc 13.0, 2026-11-26): docs/performance.md.
"""

from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

from lmoe_kernels.backends.cuda.extension import Device
from lmoe_kernels.options import Block, places_of

BLOCK = 128  # tokens, features or columns of a product's tile: csrc/cuda/copies.cuh
STEP_BYTES = 128  # bytes of an operand's row in one pipeline step: the same
# Blocks of the stages that a processor runs at once: of 16-bit products on sm_80 and sm_90, where the coefficients of E = 8,
# R = 16 leave one of dx on sm_80. One in fp32, and on sm_100 and sm_120.
RESIDENT_BLOCKS = 2
PRODUCT_COLUMNS = (64, 128, 144)  # columns of a product's tile: with_columns in csrc/cuda/launch.cuh
ONE_PASS_SMEM = 99 << 10  # every GPU from sm_80 on allows a block this much
STAGES_SMEM = 90112  # the largest of all other kernels, expand with three steps of coefficients, in bytes
DECODE_TOKENS = 16  # at most, as in csrc/cuda/decode.cuh, like the next line; up to so many the backend is taken by default
DECODE_WARPS, WARP_FEATURES, BATCH_FEATURES = 8, 256, 1024  # features of one load of a warp; of all that are on the way
DECODE_SMEM = 96 << 10  # bytes: as ONE_PASS_SMEM, less a reserve for what the system keeps
STACKED_BLOCKS = 32  # of one launch, at most: MIXTURES in csrc/params.h
PLANS = 4096  # that are kept: a search takes longer than a launch, and serving meets many numbers of tokens

# Cycles of a processor, by `python -m benchmarks.model` for sm_90 (2026-11): a model, not a measurement.
STEP_CYCLES = 1000  # of a pipeline step: of the tensor cores, or of the latency of its copies if a block is alone
SUM_CYCLES = 80  # a partial sum that a thread adds, one after the other
SUM_BYTES = 2900  # bytes of partial sums that the L2 moves in a cycle
TOGETHER = 1.75  # the time of two blocks of expand that a processor runs at once, in times of one: 1.6 to 1.8, sm_80 2.0


def ceil_div(value: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-value // divisor)


def padded(columns: int) -> int:
    """Row stride of a workspace: whole 16-byte vectors in every dtype."""
    return _multiple(columns, 8)


def product_columns(columns: int) -> int:
    """Columns of the tiles that cover so many columns of a product: few tiles, then little waste."""
    small, middle, large = PRODUCT_COLUMNS
    if columns <= small:
        return small
    return middle if ceil_div(columns, middle) == ceil_div(columns, large) else large


def wgrad_splits(tokens: int, coefficients: int, features: int, size: int, processors: int) -> int:
    """Split-K factor of wgrad, which sums over the tokens."""
    tiles = ceil_div(features, BLOCK) * ceil_div(coefficients, product_columns(coefficients))
    return _cheapest_split(tiles, ceil_div(tokens * size, STEP_BYTES), coefficients * features, processors)


def shrink_parts(tokens: int, columns: int, features: int, size: int, processors: int) -> int:
    """Split-K factor of shrink, which sums over the features of x in the forward and of dy in the backward."""
    tiles = ceil_div(tokens, BLOCK) * ceil_div(columns, product_columns(columns))
    return _cheapest_split(tiles, ceil_div(features * size, STEP_BYTES), tokens * columns, processors)


@lru_cache(PLANS)
def _cheapest_split(tiles: int, steps: int, sums: int, processors: int) -> int:
    """In how many parts to split a sum of so many pipeline steps, for `sums` numbers in so many tiles.

    More parts occupy more processors; but each one writes and reads its partial sums, 8 bytes a number, and they are added
    one after the other.
    """

    def cycles(parts: int) -> float:
        blocks_a_processor = ceil_div(tiles * parts, processors)
        product = blocks_a_processor * ceil_div(steps, parts) * STEP_CYCLES
        return product + parts * (SUM_CYCLES + 8 * sums / SUM_BYTES)

    most = min(steps, ceil_div(RESIDENT_BLOCKS * processors, max(tiles, 1)))  # more blocks gain nothing
    return min(range(1, max(most, 1) + 1), key=cycles)


@lru_cache(PLANS)
def expand_groups(tokens: int, features: int, processors: int) -> int:
    """In how many groups the tiles of features are divided, for blocks that hold the same tokens' coefficients.

    Few groups load the coefficients less often; enough of them give every processor as many blocks as it runs at once. The
    processor with the most blocks counts: two at once hide each other's latency, but take nearly twice as long as one.
    """
    token_tiles, tiles, at_once = ceil_div(tokens, BLOCK), ceil_div(features, BLOCK), RESIDENT_BLOCKS * processors

    def cycles(groups: int) -> float:
        together, alone = divmod(ceil_div(token_tiles * groups, processors), RESIDENT_BLOCKS)
        blocks = together * TOGETHER + alone
        return blocks * (ceil_div(tiles, groups) + 1)  # one more to load the coefficients

    return min(range(1, max(min(tiles, at_once), 1) + 1), key=cycles)


def one_pass_smem(tokens: int, experts: int, rank: int, columns: int, size: int, processors: int) -> int:
    """Shared memory in bytes of a block of the one-pass forward, or 0 where the forward runs stage by stage.

    `columns` are those of u and a gate's logits. One pass saves partial sums, the traffic of v, two launches and three
    workspaces. A block does all the work of a tile of tokens, and a processor runs one block after the other. Expected, by
    `python -m benchmarks.model` for an H100 and an A100: it is as fast as the stages or faster where the blocks occupy five
    sixths of the processors, on average over all waves. Otherwise the stages are faster, as they divide the work further.
    """
    tiles = ceil_div(tokens, BLOCK)
    in_whole_waves = ceil_div(tiles, processors) * processors
    if columns > PRODUCT_COLUMNS[-1] or 6 * tiles < 5 * in_whole_waves or tiles == 0:
        return 0
    step = STEP_BYTES // size
    row = STEP_BYTES + 16  # of a tile in shared memory
    shrink = 2 * (BLOCK + product_columns(columns)) * row
    v = 2 * step * (BLOCK * size + 16) + ceil_div(experts * rank, step) * BLOCK * row
    smem = max(shrink, v) + 2 * BLOCK * experts * 4  # the last term: logits and gates in fp32
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
    return _decode_plan(in_features, columns, ceil_div(out_features, column_tile), column_tile, smem, processors)


def _decode_plan(in_features: int, rows: int, tiles: int, column_tile: int, smem: int, processors: int) -> DecodePlan:
    """Share out the rows that shrink multiplies x with; `tiles` are those of y."""
    chunks = _chunks(in_features, rows, processors)
    chunk = _multiple(max(1, ceil_div(in_features, chunks)), WARP_FEATURES)
    blocks = max(tiles, ceil_div(rows * chunks, DECODE_WARPS))
    return DecodePlan(min(blocks, processors), chunk, chunks, column_tile, smem)


class Columns(NamedTuple):
    """Neighbouring columns of y that belong to the same blocks of a stacked call."""

    first: int
    width: int
    blocks: int  # a bit for each

    def tiles(self, column_tile: int) -> int:
        """How many tiles of y they are."""
        return ceil_div(self.width, column_tile)


class StackedPlan(NamedTuple):
    """How the one-launch addition of several mixtures is divided: see csrc/cuda/stacked.cuh."""

    columns: tuple[Columns, ...]
    decode: DecodePlan


@lru_cache(PLANS)
def stacked_plan(
    tokens: int, in_features: int, blocks: tuple[Block, ...], has_gate: bool, size: int, device: Device
) -> StackedPlan | None:
    """The plan of one launch for at most STACKED_BLOCKS blocks, or None where they must be added one by one.

    No tile has columns of two blocks that begin or end at different columns, so that a processor mixes only one of the
    modules of a fused layer.
    """
    if tokens > DECODE_TOKENS or not device.cooperative:
        return None
    processors, most = device.processors, min(DECODE_SMEM, device.shared_memory_a_block)
    columns = _columns_of(blocks)

    def tiles(column_tile: int) -> int:
        return sum(some.tiles(column_tile) for some in columns)

    def smem(column_tile: int) -> int:
        sizes = ((block.num_experts, block.rows_of_a // block.rank, block.rank) for block in blocks)
        return max(_decode_smem(tokens, *size_of_block, column_tile, size) for size_of_block in sizes)

    column_tile = padded(max(16, ceil_div(sum(some.width for some in columns), processors)))
    while tiles(column_tile) > max(processors, len(columns)):  # a second tile would take a processor twice the time
        column_tile += 8
    while smem(column_tile) > most:
        if column_tile <= 16:
            return None
        column_tile = padded(column_tile // 2)
    last = places_of(blocks)[-1]
    rows = last.a.stop + (last.experts.stop if has_gate else 0)
    plan = _decode_plan(in_features, rows, tiles(column_tile), column_tile, smem(column_tile), processors)
    return StackedPlan(columns, plan)


def _columns_of(blocks: tuple[Block, ...]) -> tuple[Columns, ...]:
    """The columns of y that belong to a block, cut where a block begins or ends."""
    spans = [place.columns for place in places_of(blocks)]
    cuts = sorted({span.start for span in spans} | {span.stop for span in spans})
    cut = [
        Columns(first, last - first, sum(1 << i for i, span in enumerate(spans) if span.start <= first < span.stop))
        for first, last in pairwise(cuts)
    ]
    return tuple(some for some in cut if some.blocks != 0)


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
        (experts * rank + tokens) * column_tile * size,  # lora_b's columns and the base's
        tokens * experts_of_a * rank * size,  # u
        tokens * experts * rank * size,  # v
        tokens * experts * 4,  # logits
        tokens * experts * 4,  # gates
    )
    group = 1 if tokens == 1 else 4 if tokens <= 4 else 8  # tokens that a thread computes at a time
    return sum(_multiple(size, 16) for size in arrays) + DECODE_WARPS * group * column_tile * 4


def _multiple(value: int, of: int) -> int:
    return ceil_div(value, of) * of
