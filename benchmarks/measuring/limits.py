"""The machine's limits, measured in the run that quotes them, and the least that a row's work takes under them.

The floor counts every tensor as read once and written once; the delta is written first and the frozen GEMM adds to it. It is
the sum of max(bytes / bandwidth, FLOPs / rate) over the passes that cannot overlap.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measuring.timing import Call, clock_for
from benchmarks.rows.shapes import DTYPES, Shape

NARROW = 16
READS = 256  # by each program out of the L2, so that the launch takes little of the time


@dataclass(frozen=True)
class Limits:
    """The best that the machine does."""

    copy_bytes_per_s: float  # bytes read plus bytes written, by a copy far larger than the caches
    gemm_flops_per_s: dict[str, float]  # by dtype, a large square GEMM
    narrow_flops_per_s: dict[str, float]  # by dtype, a GEMM of NARROW columns, as many as one LoRA has ranks
    cache_bytes: int  # of the last level; the copies of the inputs together exceed it
    cache_bytes_per_s: float | None = None  # bytes that all processors read out of a GPU's L2 together


def measure_limits(device: torch.device, dtypes: list[str], quick: bool) -> Limits:
    """Time copies and square GEMMs; these also warm the clocks."""
    clock, cache = clock_for(device), cache_bytes(device)
    repeats = 10 if quick else 30
    elements = max(4 * cache, 2**27) // 4

    def seconds(call: Call) -> float:
        clock.sample([call], 0, 2)
        return min(clock.sample([call], 0, 1) for _ in range(repeats))  # the least is the undisturbed one

    source, target = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    size = 8192 if device.type != "cpu" else 1024 if quick else 2048

    def rate(name: str, columns: int) -> float:
        a, b = (torch.randn(size, n, device=device).to(DTYPES[name]) for n in (size, columns))
        out = torch.empty_like(b)
        return 2 * size**2 * columns / seconds(lambda: torch.mm(a, b, out=out))

    rates, narrow_rates = ({name: rate(name, columns) for name in dtypes} for columns in (size, NARROW))
    return Limits(copied, rates, narrow_rates, cache, _cache_bytes_per_s(device, cache, seconds))


def _cache_bytes_per_s(device: torch.device, cache: int, seconds: Callable[[Call], float]) -> float | None:
    """How fast a GPU's processors read a buffer that fills half of the L2, over and over."""
    if device.type != "cuda":
        return None
    from benchmarks.measuring.l2 import read_repeatedly  # needs Triton

    buffer = torch.zeros(cache // 8, device=device)
    programs = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    return read_repeatedly(buffer, programs, READS)[1] / seconds(lambda: read_repeatedly(buffer, programs, READS))


def cache_bytes(device: torch.device) -> int:
    """The size of the last cache before the memory; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20


def floor_seconds(definition: str, shape: Shape, scope: str, phase: str, limits: Limits) -> float:
    """The roofline of a definition: the least time for one phase of it."""
    rate = limits.gemm_flops_per_s[shape.dtype]
    directions = phase.split("+")
    training = "backward" in directions
    stages = [stage for one in directions for stage in _stages(definition, shape, scope, one, training)]
    return sum(max(moved / limits.copy_bytes_per_s, flops / rate) for moved, flops in stages)


def _stages(definition: str, s: Shape, scope: str, direction: str, training: bool) -> list[tuple[int, int]]:
    """(bytes, FLOPs) of the delta and of the frozen GEMM, each a pass of its own."""
    tokens, ins, outs, experts, rank, _ = s.sizes
    size = s.itemsize
    read, written = (ins, outs) if direction == "forward" else (outs, ins)
    gemm_flops = 2 * tokens * ins * outs
    if definition == "frozen":
        return [((tokens * (read + written) + ins * outs) * size, gemm_flops)]

    ranks = rank * (1 if definition == "one" else experts)
    gates = experts if definition in ("outputs", "factors") else 0
    parameters = (ranks * (ins + outs) + gates * ins) * size
    saved = tokens * (ranks * size + 4 * gates) if training else 0
    flops = 2 * tokens * (ranks * (ins + outs) + gates * ins)
    if direction == "forward":
        moved = tokens * (ins + outs) * size + parameters + saved
    else:
        trained = definition != "scaled"  # X-LoRA's adapters are frozen: x is not read, no weight gradient is written
        moved = tokens * (outs + (2 if trained else 1) * ins) * size + (2 if trained else 1) * parameters + saved
        flops *= 2 if trained else 1
    delta = [(moved, flops)]
    if scope == "delta":
        return delta
    return [*delta, ((tokens * (read + 2 * written) + ins * outs) * size, gemm_flops)]
