"""The host's cost of one call: Python and C++ from `lmoe` to the launch of a kernel, for each backend.

    python -m benchmarks.inspect.host [--rounds 40] [--cache build/cuda_emu]

Launches are replaced by functions that return at once, so no GPU is needed. `cuda` uses bindings compiled for the emulator
(needs g++), `triton` an empty `JITFunction.run`, so Triton's own launch is left out. `torch` has no launch to replace: its
products, small here, are included. Tensors are on the CPU, and allocations cost what they cost there. The rounds interleave
all calls of a table. Shown is CPU time: the least of the rounds, and the median, which shows how busy the machine was. The
figures say nothing about a GPU.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring.timing import Call, Effort, HostClock, interleave
from benchmarks.rows.shapes import Shape, make_inputs, timed_backends
from lmoe_kernels import dispatch, lmoe
from lmoe_kernels.backends.cuda import extension
from tools import calls
from tools.emulator import build

PROCESSORS = 132
SECONDS = 0.02  # of a sample, which repeats its call
TOKENS = (1, 16, 512)
COLUMNS = ("backend alone", "no gradients", "with gradients", "+ backward")


class CpuClock(HostClock):
    """CPU time instead of wall time: what other processes take is not in it."""

    def sample(self, calls: Sequence[Call], first: int, count: int) -> float:
        """Seconds a call, over `count` calls, taken from `calls` in turn, beginning with number `first`."""
        start = time.process_time()
        for i in range(first, first + count):
            calls[i % len(calls)]()
        return (time.process_time() - start) / count


def without_cuda_launches(cache: Path) -> str | None:
    """Let the cuda backend launch nothing in this process; why not, where that is not possible."""
    if build.COMPILER is None:
        return "no g++ to compile the bindings"
    library = build.build_extension(cache, seed=1)
    ctypes.CDLL(str(library.__file__)).emu_launch_nothing(PROCESSORS)
    extension.library = lambda: library
    extension.queue = lambda tensor: (0, 0)
    extension.processors = lambda index: PROCESSORS
    return None


def without_triton_launches(cache: Path) -> str | None:
    """Likewise the triton backend."""
    try:
        from triton.runtime import JITFunction
    except ImportError:
        return "Triton is not installed"
    JITFunction.run = lambda self, *args, **kwargs: None
    return None


WITHOUT_LAUNCHES: dict[str, Callable[[Path], str | None]] = {
    "cuda": without_cuda_launches, "triton": without_triton_launches,
}  # fmt: skip


def calls_of(backend: dispatch.BackendName, tokens: int) -> list[Callable[[], object]]:
    """The calls of one line, in the order of `COLUMNS`."""
    inputs = make_inputs(Shape(tokens, 64, 64, dtype="bfloat16"), torch.device("cpu"))
    x, factors, dy = inputs.x, inputs.factors, inputs.dy
    trained = factors._replace(**{n: t.detach().requires_grad_() for n, t in factors._asdict().items() if t is not None})
    parameters = [t for t in trained if t is not None]

    def forward(a: Tensor, b: Tensor, gate: Tensor | None) -> Tensor:
        return lmoe(x, a, b, gate_weight=gate, backend=backend)

    return [
        lambda: calls.forward(backend, x, factors, save=False),
        lambda: forward(*factors[:3]),
        lambda: forward(*trained[:3]),
        lambda: torch.autograd.grad(forward(*trained[:3]), parameters, dy),
    ]


def microseconds(backends: list[dispatch.BackendName], tokens: int, rounds: int) -> dict[str, list[str]]:
    """For each backend the cells of its line: the least of the rounds, and the median in brackets."""
    effort = Effort(1, seconds=0, min_rounds=rounds, max_rounds=rounds, sample_seconds=SECONDS, cpu_products=0)
    timed = {(name, i): [call] for name in backends for i, call in enumerate(calls_of(name, tokens))}
    taken = interleave({f"{name} {i}": call for (name, i), call in timed.items()}, CpuClock(), effort)
    cells: dict[str, list[str]] = {name: [] for name in backends}
    for name, i in timed:
        samples = taken[f"{name} {i}"]
        cells[name].append(f"{1e6 * min(samples):.1f} ({1e6 * statistics.median(samples):.1f})")
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each number of tokens and backend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspect.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=Path("build/cuda_emu"), help="where the compiled bindings are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    backends: list[dispatch.BackendName] = []
    for name in timed_backends():
        reason = WITHOUT_LAUNCHES[name](options.cache.resolve()) if name in WITHOUT_LAUNCHES else None
        if reason is not None:
            print(f"{name} is left out: {reason}")
            continue
        dispatch.BACKENDS[name] = dispatch.BACKENDS[name]._replace(why_not=lambda problem: None)
        backends.append(name)
    print(f"torch {torch.__version__}, E=8 R=16 I=O=64, bf16; microseconds a call, least (median) of {options.rounds}")
    print(f"{'T':>5} {'':<8}" + "".join(f"{column:>18}" for column in COLUMNS))
    for tokens in TOKENS:
        for name, cells in microseconds(backends, tokens, options.rounds).items():
            print(f"{tokens:>5} {name:<8}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
