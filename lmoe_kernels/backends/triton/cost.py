# SPDX-License-Identifier: Apache-2.0
"""A model of what kernels cost, by which `configs.py` chooses plans: bytes, counted by formulas, and a time from them.

It is a model, and its rates were not fitted to times. `tests/triton/test_cost.py` compares the formulas with the bytes that
Triton's interpreter counts. Assumed of a chip, for each of its processors, since only the ratio of two plans' times matters:

- Memory gives as much as an H100's: 3.0 TB/s over 132 processors (measured elsewhere). Five eighths of the processors can
  draw all of it.
- The L2 gives a processor its share of 6 TB/s (published micro-benchmarks of the H100 have 5.5 to 7.0), and no more where
  others are idle. Everything that programs load and store passes through it.
- What one kernel of a call writes and the next one reads (v, dv, du, dlogits, partial sums) stays in the L2, except partial
  sums of more than 24 MB, half of an H100's L2. All other tensors pass through memory once for each kernel that uses them.
- From one kernel to the next 2.5 us pass, and 1 us from the begin of a wave of programs until its loads arrive.

An H200 gave 4.1 TB/s in copies, 8.1 to 8.6 TB/s out of its L2, and 791 to 797 TFLOP/s in products of bf16 (2026-11-26). Of
the plans that were timed there, the model was right about the splits of up to 1024 tokens, and wrong about tiles:

- At 8192 tokens, E=8 and R=16 it preferred tiles of 128 tokens in two splits, 64.9 us, to tiles of 64 tokens in steps of
  128 features without splits, 60.0 us. One pass, which has the least traffic, took 64.5 us.
- Weight gradients in tiles of 256 features, which load the fewest bytes, took 40.2 us, those in tiles of 64 and 128 features
  32.1 to 35 us.

So on Hopper's chips in half precision `hopper.py` decides between such plans, and the model elsewhere.
"""

from typing import NamedTuple

DRAWS_ALL = 5 / 8  # of the processors can draw what the memory gives
KEPT = 24 << 20  # bytes of partial sums that stay in the L2


class Rates(NamedTuple):
    """What bytes and kernels cost."""

    memory: float  # bytes a second for each processor
    l2: float
    launch: float  # seconds for each kernel
    wave: float  # and for each of its waves of programs


H100 = Rates(memory=3.0e12 / 132, l2=6.0e12 / 132, launch=2.5e-6, wave=1e-6)


class Traffic(NamedTuple):
    """What one kernel moves, in bytes."""

    programs: int
    loaded: int  # by all programs, each for itself
    stored: int
    memory: int  # of the tensors that lived before the call or live after it, each once
    slots: int = 1  # programs that a processor runs at once

    def seconds(self, processors: int, rates: Rates = H100) -> float:
        """The modelled time on a chip of so many processors."""
        if self.programs == 0:
            return 0.0
        busy = self.programs / ceil_div(self.programs, processors)  # processors, on average
        through_memory = self.memory / (rates.memory * min(processors, busy / DRAWS_ALL))
        through_l2 = (self.loaded + self.stored) / (rates.l2 * busy)
        waves = ceil_div(self.programs, self.slots * processors)
        return max(through_memory, through_l2) + waves * rates.wave + rates.launch


def shrink(T: int, F: int, columns: int, gate: int, block_T: int, block_ER: int, splits: int, size: int) -> Traffic:
    """Sums of rows with a factor, and with the gate where it has columns; elements have `size` bytes.

    There are so many splits, or none in a kernel that keeps the sums in registers.
    """
    tiles, of_columns = ceil_div(T, block_T), ceil_div(columns, block_ER)
    programs = tiles * of_columns * splits or tiles
    loaded = (of_columns * T + tiles * (columns + gate * (of_columns if splits else 1))) * F
    sums = splits * T * (columns + gate) * max(size, 4)
    return Traffic(programs, loaded * size, sums, (T + columns + gate) * F * size + (sums if sums > KEPT else 0))


def mix_fwd(T: int, columns: int, ER: int, gate: int, block_T: int, splits: int, size: int) -> Traffic:
    """From the splits' sums, or where there are none from registers, to u, the logits and v."""
    acc = max(size, 4)
    logits, sums = T * gate * acc, splits * T * (columns + gate) * acc
    return Traffic(
        ceil_div(T, block_T),
        sums + T * columns * size,
        logits + T * (columns + ER) * size,
        logits + T * columns * size + (sums if sums > KEPT else 0),
    )


def mix_bwd(T: int, columns: int, ER: int, E: int, block_T: int, splits: int, size: int) -> Traffic:
    """From the sums of dv to du, dlogits and v: dv, which is scratch of the kernel, and u are loaded twice."""
    acc = max(size, 4)
    logits, sums = 2 * T * E * acc, splits * T * ER * acc  # logits and their own gradient
    return Traffic(
        ceil_div(T, block_T),
        sums + logits + 2 * T * (columns + ER) * size,
        T * (columns + 2 * ER + E) * size,
        logits + T * columns * size + (sums if sums > KEPT else 0),
    )


def expand(T: int, F: int, columns: int, gate: int, block_T: int, chunks: int, loads: int, size: int) -> Traffic:
    """Columns of the tokens with a factor, and with the gate: in chunks of features, with so many loads of each column."""
    tiles, rows = ceil_div(T, block_T), T * F * size
    factors = (columns + gate) * F * size
    return Traffic(tiles * chunks, loads * T * (columns + gate) * size + tiles * factors, rows, rows + factors)


def fused(*stages: Traffic) -> Traffic:
    """One kernel of several stages, with the programs of the first one."""
    first = stages[0]
    loaded, stored, memory = (sum(getattr(stage, what) for stage in stages) for what in ("loaded", "stored", "memory"))
    return Traffic(first.programs, loaded, stored, memory, first.slots)


def ceil_div(size: int, block: int) -> int:
    """Blocks that cover a size."""
    return -(-size // block)
