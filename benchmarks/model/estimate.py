"""The time of a kernel: for each of its phases the largest of what its resources need, and which of them that is."""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.model.chips import DRAWS_ALL, FILL_AND_DRAIN, L2_PORT, LOADED_LATENCY, SCHEDULERS, SHARED_PORT, Chip
from benchmarks.model.loops import Step
from benchmarks.rows.shapes import Shape


def ceil_div(value: float, divisor: float) -> int:
    """The quotient, rounded up."""
    return int(-(-value // divisor))


class Work(NamedTuple):
    """What each block does, so many times in sequence."""

    times: float
    step: Step
    in_flight: int = 0  # steps whose copies are under way while one is computed; 0: the step waits for no copy


class Phase(NamedTuple):
    """A part of a kernel that does not overlap with its others."""

    name: str
    works: Sequence[Work]
    memory: float = 0  # bytes through memory
    l2: float = 0  # bytes through the L2
    seconds: float = 0  # the least that it takes: barriers, and loops that are not read from machine code


class Estimate(NamedTuple):
    """A kernel with its time and what explains it."""

    kernel: str
    detail: str
    registers: int
    shared: int  # bytes of shared memory that its launch asks for
    blocks: int
    resident: int
    step: Step | None  # of its main loop
    seconds: float
    bound: str
    floor: float  # seconds for what it must read, write and multiply


def estimate(
    chip: Chip, kernel: str, phases: Sequence[Phase], *, blocks: int, threads: int, resident: int, registers: int,
    shared: int, floor: float, detail: str = "",
) -> Estimate:  # fmt: skip
    """The time of a kernel whose blocks all go through the same phases."""
    total, longest, bound = FILL_AND_DRAIN, 0.0, ""
    busy = blocks / ceil_div(blocks, chip.processors)  # processors, on average
    memory = chip.memory * min(1.0, busy / (DRAWS_ALL * chip.processors))
    l2 = min(chip.l2, busy * L2_PORT * chip.clock)
    for phase in phases:
        cycles, why = processor_cycles(chip, phase.works, blocks, threads // 32, resident)
        needs = {why: cycles / chip.clock, "memory": phase.memory / memory, "L2": phase.l2 / l2, "latency": phase.seconds}
        largest = max(needs, key=needs.__getitem__)
        seconds = needs[largest]
        total += seconds
        if seconds > longest:
            longest, bound = seconds, f"{phase.name}: {largest}" if len(phases) > 1 else largest
    steps = [work.step for phase in phases for work in phase.works if work.step.products]
    return Estimate(kernel, detail, registers, shared, blocks, resident, steps[0] if steps else None, total, bound, floor)


def processor_cycles(chip: Chip, works: Sequence[Work], blocks: int, warps: int, resident: int) -> tuple[float, str]:
    """Cycles of the processor with the most blocks, which takes as many at once as fit; and what binds for the longest."""
    of_one = ceil_div(blocks, chip.processors)
    waves, rest = divmod(of_one, resident)
    cycles: dict[str, float] = {}
    for together, times in ((resident, waves), (rest, 1)):
        for work in works if together and times else ():
            needs = needs_of(work, together * warps)
            why = max(needs, key=needs.__getitem__)
            cycles[why] = cycles.get(why, 0.0) + times * work.times * needs[why]
    return sum(cycles.values()), max(cycles, key=cycles.__getitem__, default="nothing")


def needs_of(work: Work, warps: int) -> dict[str, float]:
    """The cycles of one step in which so many warps of a processor take part, by resource."""
    step, of_scheduler = work.step, ceil_div(warps, SCHEDULERS)
    return {
        "one warp alone": step.alone,
        "copies under way": LOADED_LATENCY / work.in_flight if work.in_flight else 0.0,
        "issue": of_scheduler * step.instructions,
        "integer pipe": of_scheduler * step.alu,
        "tensor cores": of_scheduler * step.tensor,
        "shared memory": warps * step.shared / SHARED_PORT,
    }


def floor_seconds(chip: Chip, shape: Shape, direction: str) -> float:
    """The delta alone: x and y, or dy, x and dx, and the factors through memory once, or its products.

    In the backward the factors' gradients, too.
    """
    T, I, O, E, R, _ = shape.sizes  # noqa: E741
    features, times = (I + O, 1) if direction == "forward" else (O + 2 * I, 2)
    parameters = (E * R + E) * I + E * R * O
    moved = (T * features + times * parameters) * shape.itemsize
    return max(moved / chip.memory, 2 * times * T * parameters / chip.gemm)
