"""The phases of the forward of few tokens: csrc/cuda/decode.cuh. They are formulas: its loops run as often as sizes say."""

from benchmarks.model import mix
from benchmarks.model.chips import GRID_BARRIER, L2_LATENCY, LOADED_LATENCY, Chip
from benchmarks.model.estimate import Phase, ceil_div
from benchmarks.rows.shapes import Shape
from lmoe_kernels.backends.cuda import configs

SIZE = 2  # bytes of an element
FIRST_TOUCH = 1.7 * LOADED_LATENCY  # GUESS: cycles until the first loads of a cold kernel arrive
BATCH = 760  # GUESS: cycles of one batch of vector loads of a warp, most of it their latency
TOTALS = 4  # that a thread loads together, as in decode.cuh
# Cycles of a warp alone, read once from the machine code for sm_90 (nvcc 13.0, 2026-11-26): of a rank that it sums in
# expand, of each token with it, and to add the warps' sums of a tile and store them.
RANK, OF_TOKEN, SUM_OF_WARPS = 18, 5, 280


def phases_of_decode(chip: Chip, shape: Shape, plan: configs.DecodePlan) -> list[Phase]:
    """Shrink, the barrier of the grid, the totals, softmax with mix, and expand on FMAs."""
    T, I, O, E, R, _ = shape.sizes  # noqa: E741
    count, warps = E * R + E, configs.DECODE_WARPS
    group = 1 if T == 1 else 4 if T <= 4 else 8  # tokens that a thread computes at a time
    rounds = ceil_div(count, plan.blocks * (warps // plan.chunks))
    batches = rounds * ceil_div(T, group) * ceil_div(plan.chunk, configs.BATCH_FEATURES)
    factors, x, b, y = count * I * SIZE, T * I * SIZE, E * R * O * SIZE, T * O * SIZE
    totals = ceil_div(T * count, TOTALS * 32 * warps) * L2_LATENCY
    tiles = ceil_div(O, plan.column_tile * plan.blocks)
    of_group = ceil_div(plan.column_tile, 32) * ceil_div(E * R, warps) * (RANK + group * OF_TOKEN) + SUM_OF_WARPS
    expand = tiles * ceil_div(T, group) * of_group
    return [
        Phase("shrink", (), factors + x, count * x + factors, (FIRST_TOUCH + BATCH * batches) / chip.clock),
        Phase("grid barrier", (), 0, 0, GRID_BARRIER),
        Phase("totals", (), 0, plan.blocks * T * count * 4, totals / chip.clock),
        Phase("mix", (), 0, 0, mix.of_a_block(T, E, R, 32 * warps) / chip.clock),
        Phase("expand", (), b + y, b + y, expand / chip.clock),
    ]
