"""The chips of the model, and everything that it assumes: each input has its source, and a guess is called GUESS."""

from typing import NamedTuple

from benchmarks.inspect.machine_code import programs_of_a_processor


class Chip(NamedTuple):
    """A GPU: rates are of all of it, cycles are of one processor."""

    name: str
    arch: str
    processors: int  # data sheet
    clock: float  # GUESS: Hz under load, below the data sheet's boost clock
    memory: float  # bytes a second of a copy, read and written together
    gemm: float  # FLOP a second of a large bf16 GEMM
    l2: float  # GUESS: bytes a second from the L2 to all processors
    kept: int  # GUESS: bytes that a kernel writes and the next one still finds in the L2: half of it

    @property
    def hmma(self) -> float:
        """Cycles that one m16n8k16 of a warp occupies the tensor core of a scheduler."""
        return HMMA[self.arch]

    @property
    def memory_source(self) -> str:
        """Where the rates of memory and GEMM are from."""
        return "measured elsewhere" if self.arch == "sm_90" else "GUESS"


# Cycles of one m16n8k16 by mma.sync. On sm_80 it reaches the tensor cores' peak, on sm_90 62 % of it (arXiv 2402.13499
# measured 62.9 %), which is 4 cycles. GUESS for the others: sm_100 as sm_90, sm_120 at its peak.
HMMA = {"sm_80": 8.0, "sm_90": 4 / 0.62, "sm_100": 4 / 0.62, "sm_120": 16.0}
# The copies and GEMMs of the H100 and the H200 were measured on such chips, not by this project's benchmarks. On an H200
# these found later: a copy of 4.1e12, reads from the L2 of 8.1e12, a GEMM of 791e12 (2026-11-26).
CHIPS = {
    "H100": Chip("H100", "sm_90", 132, 1.9e9, 3.0e12, 798e12, 5.5e12, 25_000_000),
    "H200": Chip("H200", "sm_90", 132, 1.9e9, 4.3e12, 788e12, 5.5e12, 25_000_000),
    "A100": Chip("A100", "sm_80", 108, 1.41e9, 1.8e12, 260e12, 4.0e12, 20_000_000),
}
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "sm_120": 100 << 10}  # of a processor
SCHEDULERS = 4  # of a processor, each with an issue slot a cycle: CUDA programming guide
L2_PORT = 64  # bytes a cycle that a processor can take from the L2: NVIDIA's A100 whitepaper
SHARED_PORT = 128  # bytes a cycle of a processor's shared memory: CUDA programming guide

LAUNCH_EAGER = 3.0e-6  # GUESS: seconds from a kernel's end to the next one's begin, launched one by one
LAUNCH_GRAPH = 1.3e-6  # GUESS: the same in a CUDA graph
LAUNCH_HIDDEN = 1.0e-6  # GUESS: the same where kernels are so long that the host runs ahead
GRID_BARRIER = 1.7e-6  # GUESS: seconds of a cooperative launch's barrier
FILL_AND_DRAIN = 1.0e-6  # GUESS: seconds of a kernel before its first block is at work and while its last one ends
LOADED_LATENCY = 1000  # GUESS: cycles until a copy from memory arrives while others are under way
L2_LATENCY = 300  # GUESS: cycles until a load from the L2 arrives
SOFTMAX = 1500  # GUESS: cycles of the softmax of the tokens of a block, with the barriers around it
TEAM_SOFTMAX = 500  # GUESS: cycles of the softmax of one token by a part of a warp
MIX_RANK, MIX_EXPERT = 60, 28  # GUESS: cycles to mix one rank of a token, and of each of its experts
DRAWS_ALL = 5 / 8  # GUESS: this share of the processors can draw what the memory gives

CUBLAS_OF_A_COPY = 0.65  # GUESS: what cuBLAS's GEMMs with a narrow side reach of a copy's bytes a second
CUBLAS_OF_A_GEMM = 0.85  # GUESS: what its wide GEMMs on other sizes reach of the measured rate
ELEMENTWISE = 1.0e-6  # GUESS: the least time of one of ATen's elementwise kernels


def resident_blocks(registers: int, threads: int, shared: int, arch: str) -> int:
    """The blocks that fit a processor of a chip at once, by registers of a thread, threads, and bytes of shared memory."""
    return programs_of_a_processor(arch, registers, threads // 32, shared, 0)


def inputs() -> str:
    """Everything that the model assumes, one line each."""
    lines = [
        f"{chip.name}: {chip.processors} processors, copy {chip.memory / 1e12:.1f} TB/s, GEMM {chip.gemm / 1e12:.0f} "
        f"TFLOP/s ({chip.memory_source}), {chip.hmma:.2f} cycles for a m16n8k16; GUESS: {chip.clock / 1e9:.2f} GHz,\n"
        f"    {chip.l2 / 1e12:.1f} TB/s from the L2, {chip.kept / 1e6:.0f} MB of it kept between kernels"
        for chip in CHIPS.values()
    ]
    eager, graph, hidden, barrier, fill, elementwise = (
        f"{1e6 * seconds:.1f} us"
        for seconds in (LAUNCH_EAGER, LAUNCH_GRAPH, LAUNCH_HIDDEN, GRID_BARRIER, FILL_AND_DRAIN, ELEMENTWISE)
    )
    guesses = (
        f"{eager} between kernels launched one by one, {graph} in a graph, {hidden} where the host runs ahead",
        f"{barrier} for the barrier of a grid, {fill} to fill and drain a kernel",
        f"{LOADED_LATENCY} cycles until a copy from memory arrives, {L2_LATENCY} from the L2",
        f"{100 * DRAWS_ALL:.0f} % of the processors can draw what the memory gives",
        f"{SOFTMAX} cycles for the softmax of a block's tokens, {TEAM_SOFTMAX} for that of a part of a warp",
        f"{MIX_RANK} cycles to mix a rank, and {MIX_EXPERT} for each of its experts",
        f"cuBLAS reaches {100 * CUBLAS_OF_A_COPY:.0f} % of a copy where a side is narrow",
        f"cuBLAS reaches {100 * CUBLAS_OF_A_GEMM:.0f} % of the GEMM's rate",
        f"one of ATen's elementwise kernels takes {elementwise} at least",
    )
    lines += [f"GUESS: {guess}" for guess in guesses]
    architecture = f"{SCHEDULERS} schedulers, {SHARED_PORT} bytes a cycle of shared memory, {L2_PORT} from the L2"
    return "\n".join([*lines, f"Architecture, of a processor: {architecture}"])
