"""How times are taken: rows interleaved in one process, in another order every round, over several copies of the inputs.

A disturbance of a second slows all rows of a round alike: ratios are taken within a round, and medians over the rounds. One
that lasts longer, or that comes from the addresses of the tensors, shows between visits: a run measures all its tables
several times, on fresh inputs each time.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]
REPLAY_ONLY = 100e-6  # seconds below which an eager launch on a GPU measures the host


@dataclass(frozen=True)
class Effort:
    """How long the rows of a table are measured, and how much of them is checked."""

    visits: int  # of every table
    seconds: float  # of a visit, after which no further round begins
    min_rounds: int  # of a visit
    max_rounds: int  # of a visit
    sample_seconds: float  # a sample repeats its call until it is about this long
    cpu_products: int  # T I O up to which a CPU checks every token; of a larger problem it checks the first tokens


QUICK = Effort(visits=5, seconds=0.6, min_rounds=2, max_rounds=5, sample_seconds=1e-3, cpu_products=2**27)
FULL = Effort(visits=5, seconds=2.0, min_rounds=2, max_rounds=11, sample_seconds=5e-3, cpu_products=2**33)


@dataclass(frozen=True)
class Spread:
    """A median with the 20th and 80th percentiles around it, and the median of each visit."""

    median: float
    low: float
    high: float
    visits: tuple[float, ...]

    @classmethod
    def of(cls, visits: Sequence[Sequence[float]]) -> "Spread":
        """Summarise the samples of one visit at least, one sample each at least."""
        samples = [sample for visit in visits for sample in visit]
        fifths = quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else samples * 4
        return cls(median(samples), fifths[0], fifths[3], tuple(map(median, visits)))


class HostClock:
    """Times on the host: for a CPU."""

    def sample(self, calls: Sequence[Call], first: int, count: int) -> float:
        """Seconds a call, over `count` calls, taken from `calls` in turn, beginning with number `first`."""
        start = time.perf_counter()
        for i in range(first, first + count):
            calls[i % len(calls)]()
        return (time.perf_counter() - start) / count


class DeviceClock:
    """Times by the GPU's own events, read after it is done."""

    def sample(self, calls: Sequence[Call], first: int, count: int) -> float:
        """Seconds a call, over `count` calls, taken from `calls` in turn, beginning with number `first`."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(first, first + count):
            calls[i % len(calls)]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count


def clock_for(device: torch.device) -> HostClock | DeviceClock:
    """The clock that includes the work of a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()


def interleave(
    rows: Mapping[str, Sequence[Call]], clock: HostClock | DeviceClock, effort: Effort, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds a call of every row, one sample a round.

    Args:
        rows: for each name the same work on several copies of its inputs, taken in turn so that caches stay cold.

    Returns:
        for each name as many samples as there were rounds; the samples number i of all rows are of one round.
    """
    counts = {}
    for name, calls in rows.items():
        warm = time.perf_counter() + effort.seconds / 10
        for i in range(len(calls)):  # what happens on first use only; for slow rows a copy or two suffice
            clock.sample(calls, i, 1)
            if time.perf_counter() > warm:
                break
        counts[name] = max(1, min(1000, int(effort.sample_seconds / max(1e-7, clock.sample(calls, 0, 1)))))
    samples: dict[str, list[float]] = {name: [] for name in rows}
    order, shuffle = list(rows), random.Random(seed).shuffle
    end = time.perf_counter() + effort.seconds
    for i in range(effort.max_rounds):
        if i >= effort.min_rounds and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            samples[name].append(clock.sample(rows[name], i * counts[name], counts[name]))
    return samples


def capture(make: Callable[[], Call]) -> Call:
    """A call as a CUDA graph's replay: the time of the GPU alone, without that of the host.

    `make` builds the call, on the stream of the capture: autograd runs a backward on the stream of its forward, and work on
    another stream than the capture's would end the capture with an error.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay(_held: Call = call) -> None:  # keeps the call alive: a backward reads what the forward saved
        graph.replay()

    return replay
