"""The host's cost of one call: Python and C++ down to the driver, for each backend and for the factored form in PyTorch.

    python -m benchmarks.inspect.host [--rounds 40] [--cache build/cuda_emu]

No GPU is needed, since the driver is a stub: `triton` compiles its kernels and launches them by Triton's own code, and the
stub of `cuLaunchKernelEx` returns at once. `cuda` uses bindings compiled for the emulator (needs g++), which launch nothing.
`torch` and `eager`, the factored form as ten lines of PyTorch, have no driver to stub: they run on the CPU, on one token of
16 features whatever T is, and their small products are included. The others' tensors, of 4096 features, are on the CPU too,
where nothing reads or writes them. Allocations cost what they cost there, taken from a heap that keeps what is freed.

In the first table a call follows itself at once, so that its data and code are in the caches (hot). In the second table one
byte of every 64-byte line of 64 MiB is written before each call (cold), which leaves none of them in an L2 of up to 64 MiB,
as the work of other layers does. A larger L3, and the branch predictors, may keep some.

Shown is CPU time: the least of the rounds, which interleave all calls of a table, and the median, which shows how busy the
machine was. The figures say nothing about a GPU.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring.timing import Call, Effort, HostClock, interleave
from benchmarks.rows.baselines import ten_lines
from benchmarks.rows.shapes import Shape, make_inputs, timed_backends
from lmoe_kernels import dispatch, lmoe
from lmoe_kernels.backends.cuda import extension
from tools import calls
from tools.emulator import build

PROCESSORS = 132
SECONDS = 0.02  # of a hot sample, which repeats its call
TOKENS = (1, 64, 512, 2048)
COLUMNS = ("backend forward", "backend backward", "no gradients", "with gradients", "+ backward")
LINE, SWEPT = 64, 64 << 20  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


class HotClock(HostClock):
    """CPU time instead of wall time: what other processes take is not in it."""

    def sample(self, calls: Sequence[Call], first: int, count: int) -> float:
        """Seconds a call, over `count` calls, taken from `calls` in turn, beginning with number `first`."""
        start = time.process_time()
        for i in range(first, first + count):
            calls[i % len(calls)]()
        return (time.process_time() - start) / count


class ColdClock(HotClock):
    """The same of one call, after other data has taken its place in the caches."""

    def __init__(self) -> None:
        self._lines = torch.zeros(SWEPT, dtype=torch.uint8)[::LINE]

    def sample(self, calls: Sequence[Call], first: int, count: int) -> float:
        """Seconds of call number `first`."""
        self._lines.add_(1)
        return super().sample(calls, first, 1)


def without_cuda_launches(cache: Path, _: ExitStack) -> str | None:
    """Let the cuda backend launch nothing in this process; why not, where that is not possible."""
    if build.COMPILER is None:
        return "no g++ to compile the bindings"
    library = build.build_extension(cache, seed=1)
    ctypes.CDLL(str(library.__file__)).emu_launch_nothing(PROCESSORS)
    extension.library = lambda: library
    extension.queue = lambda tensor: (0, 0)
    device = extension.Device(*library.properties(0))
    extension.device_of = lambda index: device
    return None


def without_triton_driver(_: Path, until: ExitStack) -> str | None:
    """Let Triton launch by a stub of the driver, until the end of a `with` block."""
    try:
        from tools import stubbed_gpu
    except ImportError:
        return "Triton is not installed"
    if stubbed_gpu.COMPILER is None:
        return "no C compiler to compile the stub"
    until.enter_context(stubbed_gpu.stubbed_gpu())
    return None


WITHOUT_LAUNCHES: dict[str, Callable[[Path, ExitStack], str | None]] = {
    "cuda": without_cuda_launches, "triton": without_triton_driver,
}  # fmt: skip


def calls_of(row: str, tokens: int) -> list[Callable[[], object]]:
    """The calls of one line, in the order of `COLUMNS`."""
    shape = Shape(tokens, 4096, 4096, dtype="bfloat16") if row in WITHOUT_LAUNCHES else Shape(1, 16, 16, dtype="bfloat16")
    inputs = make_inputs(shape, torch.device("cpu"))
    x, factors, dy = inputs.x, inputs.factors, inputs.dy
    trained = factors._replace(**{n: t.detach().requires_grad_() for n, t in factors._asdict().items() if t is not None})
    parameters = [x.detach().requires_grad_(), *(t for t in trained if t is not None)]

    def forward(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        return ten_lines(x, None, a, b, gate) if row == "eager" else lmoe(x, a, b, gate_weight=gate, backend=row)  # pyright: ignore[reportArgumentType]

    given = [x, *(t for t in factors if t is not None)]
    of_functions = [
        lambda: forward(*given),
        lambda: forward(*parameters),
        lambda: torch.autograd.grad(forward(*parameters), parameters, dy),
    ]
    if row == "eager":
        y = forward(*parameters)
        return [of_functions[0], lambda: torch.autograd.grad(y, parameters, dy, retain_graph=True), *of_functions]
    _, saved = calls.forward_saved(row, x, factors)
    return [
        lambda: calls.forward(row, x, factors),
        lambda: calls.backward(row, dy, x, factors, saved),
        *of_functions,
    ]


def microseconds(rows: list[str], tokens: int, clock: HostClock, rounds: int) -> dict[str, list[str]]:
    """For each row the cells of its line: the least of the rounds, and the median in brackets."""
    effort = Effort(1, seconds=0, min_rounds=rounds, max_rounds=rounds, sample_seconds=SECONDS, cpu_products=0)
    timed = {(name, i): [call] for name in rows for i, call in enumerate(calls_of(name, tokens))}
    taken = interleave({f"{name} {i}": call for (name, i), call in timed.items()}, clock, effort)
    cells: dict[str, list[str]] = {name: [] for name in rows}
    for name, i in timed:
        samples = taken[f"{name} {i}"]
        cells[name].append(f"{1e6 * min(samples):.1f} ({1e6 * statistics.median(samples):.1f})")
    return cells


def keep_freed_memory() -> None:
    """Let large tensors come from a heap that keeps what is freed, as a GPU's allocator does: no system call each time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def main(arguments: list[str] | None = None) -> None:
    """Print a table of hot calls and one of cold calls, each with a line for each number of tokens and row."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspect.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=Path("build/cuda_emu"), help="where the compiled bindings are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: list[str] = []
    with ExitStack() as until:
        for name in timed_backends():
            reason = WITHOUT_LAUNCHES[name](options.cache.resolve(), until) if name in WITHOUT_LAUNCHES else None
            if reason is not None:
                print(f"{name} is left out: {reason}")
                continue
            dispatch.BACKENDS[name] = dispatch.BACKENDS[name]._replace(why_not=lambda problem: None)
            rows.append(name)
        rows.append("eager")
        print(f"torch {torch.__version__}, {_triton()}, E=8 R=16 I=O=4096, bf16")
        for title, clock in (("hot", HotClock()), ("cold", ColdClock())):
            print(f"{title}: microseconds a call, least (median) of {options.rounds}")
            print(f"{'T':>5} {'':<8}" + "".join(f"{column:>18}" for column in COLUMNS))
            for tokens in TOKENS:
                for name, cells in microseconds(rows, tokens, clock, options.rounds).items():
                    print(f"{tokens:>5} {name:<8}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "no Triton"
    return f"Triton {triton.__version__}"


if __name__ == "__main__":
    main()
