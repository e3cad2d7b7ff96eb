# SPDX-License-Identifier: Apache-2.0
"""Compile kernels before they are needed: in processes of their own, which leave them in Triton's cache on the disk.

Which kernels a call needs is recorded by Triton itself: the call is made on meta tensors, and every launch becomes a
`warmup` that a hook ends before it compiles. The hook is given what `JITFunction.preload` compiles in another process, under
the key that a launch looks for. Both are public in Triton 3.6 and 3.7.

Neither the recording nor the compiling needs a GPU: the processes take the chip from this one. Jobs and results are pickled
only between a program and the processes that it has started; nothing is read from a file.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends import backends
from triton.backends.compiler import GPUTarget

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.backward import backward
from lmoe_kernels.backends.triton.dropout import dropout
from lmoe_kernels.backends.triton.forward import forward
from lmoe_kernels.backends.triton.plans import Chip, Tile
from lmoe_kernels.options import Factors, Options, Sizes, Wanted

Job = TypeVar("Job")
Result = TypeVar("Result")
_KERNELS_OF_A_CALL = 8  # about
_MOST_PROCESSES = 16  # each of them imports PyTorch, some 300 MB


class Call(NamedTuple):
    """What the kernels of a layer's forward and backward depend on."""

    sizes: Sizes
    dtype: torch.dtype  # of x
    factors: tuple[torch.dtype | None, ...]  # the dtype of each field of Factors; None where it is not given
    base_dims: int  # 0: no base; 1: a bias; 2: the output of another layer
    options: Options
    returns_logits: bool
    wanted: Wanted  # nothing: there is no backward


class Kernel(NamedTuple):
    """What Triton compiles, in its own words."""

    module: str
    name: str
    specialization: str


def run(call: Call, device: torch.device) -> None:
    """Make the forward and the backward of a call, on zeros."""
    T, I, O, E, R, experts_of_a = call.sizes  # noqa: E741

    def zeros(*shape: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    shapes = ((experts_of_a, R, I), (E, R, O), (E, I), (E,), (T, E))
    given = zip(shapes, call.factors, strict=True)
    factors = Factors(*(None if dtype is None else zeros(*shape, dtype=dtype) for shape, dtype in given))  # pyright: ignore[reportArgumentType]
    x, base = zeros(T, I), (None, zeros(O), zeros(T, O))[call.base_dims]
    with torch.no_grad():
        if call.options.dropout > 0:
            dropout(x, zeros(dtype=torch.int64), call.options.dropout)
        forward(x, factors, base, call.options, save=call.returns_logits)
        if any(call.wanted):
            _, saved = forward(x, factors, base, call.options, save=True)
            assert saved is not None
            dlogits = torch.zeros_like(saved.router_logits(factors)) if call.returns_logits else None
            backward(zeros(T, O), dlogits, x, factors, saved, call.options, wanted=call.wanted)


def distinct(calls: Iterable[Call], chip: Chip) -> list[Call]:
    """One of the calls for each choice of kernels: the number of tokens matters only where it changes a plan."""
    return list({(call._replace(sizes=call.sizes._replace(T=0)), *_plans(call, chip)): call for call in calls}.values())


def _plans(call: Call, chip: Chip) -> tuple[Any, ...]:
    """All that the number of tokens decides."""
    sizes, dtype = call.sizes, call.dtype
    T, I, O, E, R, experts_of_a = sizes  # noqa: E741
    heights = ((O, (E * R,)), (I, (experts_of_a * R, E)), (I, (experts_of_a * R,)), (I, (E,)))
    wgrads = [configs.wgrad_plan(T, features, rows, dtype, chip) for features, rows in heights]
    return (
        configs.forward_plan(sizes, dtype, chip),
        configs.backward_plan(sizes, dtype, chip),
        configs.grouped_plan(sizes, call.options, dtype, chip),
        *((plan.tile, plan.splits > 1) for plan in wgrads),
    )


@contextmanager
def recording() -> Iterator[dict[Kernel, None]]:
    """Within the block nothing is launched: kernels that are not loaded are added to the result, each once."""
    found: dict[Kernel, None] = {}
    launch, hook = host.launch, knobs.runtime.jit_cache_hook

    def record(kernel: Any, grid: tuple[int, ...], *args: object, tile: Tile, **constants: object) -> None:
        kernel.warmup(*args, grid=grid, **constants, **host.launch_options(kernel, tile))

    def keep(*, fn: Any, compile: Any, **_: object) -> bool:
        found[Kernel(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # compile nothing

    host.launch, knobs.runtime.jit_cache_hook = record, keep
    try:
        yield found
    finally:
        host.launch, knobs.runtime.jit_cache_hook = launch, hook


def kernels_of(call: Call) -> list[Kernel]:
    """The kernels of a call; in one of the processes, where none is loaded."""
    with recording() as found:
        run(call, torch.device("meta"))
    return list(found)


def compile_kernel(kernel: Kernel) -> str | None:
    """Compile a kernel into the cache on the disk; why not, where it cannot be compiled."""
    try:
        function = getattr(import_module(kernel.module), kernel.name)
        compiled = function.preload(kernel.specialization)
        driver: Any = triton.runtime.driver.active
        driver.launcher_cls(compiled.src, compiled.metadata)  # in Triton 3.6 a launcher is compiled too, in C
    except Exception as error:  # a tile that is too large must not end the others
        return f"{type(error).__name__}: {error}"
    return None


def ready(
    calls: Iterable[Call], device: torch.device, most: int, progress: Callable[[Iterable[Any], int], Iterable[Any]]
) -> int:
    """Compile the kernels of calls in at most so many processes, and load them on a device; returns their number."""
    if knobs.runtime.interpret:
        return 0
    chip = host.chip_of(device)
    needed = distinct(calls, chip)
    most = min(most, _KERNELS_OF_A_CALL * len(needed))
    with host.on_device_of(torch.empty(0, device=device)), Processes(most, chip) as processes:
        kernels = list(dict.fromkeys(kernel for found in processes.map(kernels_of, needed) for kernel in found))
        for _ in progress(processes.map(compile_kernel, kernels), len(kernels)):
            pass  # a kernel that cannot be compiled raises in the call below
    for call in needed:
        run(call, device)
    return len(kernels)


def most_processes() -> int:
    """How many processes compile by default."""
    return min(_MOST_PROCESSES, os.cpu_count() or 1)


class Processes:
    """Some processes that compile for the current chip, until the end of a `with` block."""

    def __init__(self, count: int, chip: Chip) -> None:
        target = triton.runtime.driver.active.get_current_target()
        # Not a pool of `multiprocessing`: its processes would run the user's main module again.
        program = f"from {__name__} import work; work()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
        self._all = [
            subprocess.Popen([sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(count)
        ]
        self._idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for process in self._all:
            pickle.dump((target, chip, torch.backends.cuda.matmul.fp32_precision), process.stdin)  # pyright: ignore[reportArgumentType]
            self._idle.put(process)

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """The results of a function of this module, in the order of the jobs."""

        def ask(job: Job) -> Result:
            process = self._idle.get()
            try:
                pickle.dump((function, job), process.stdin)  # pyright: ignore[reportArgumentType]
                process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
                return pickle.load(process.stdout)  # pyright: ignore[reportArgumentType]
            except (EOFError, OSError) as error:
                raise RuntimeError(f"a process that compiles kernels ended with status {process.wait()}") from error
            finally:
                self._idle.put(process)

        with ThreadPoolExecutor(len(self._all)) as threads:
            yield from threads.map(ask, jobs)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._all:
            process.kill()
            process.communicate()


def work() -> None:
    """What each process does: take jobs from its input and write their results to its output, until it is ended."""
    jobs, results = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print must not be among the results
    target, chip, torch.backends.cuda.matmul.fp32_precision = pickle.load(jobs)
    triton.runtime.driver.set_active(_driver_of(target))
    host.chip_of = lambda device: chip
    while True:
        try:
            function, job = pickle.load(jobs)
        except EOFError:
            return
        pickle.dump(function(job), results)
        results.flush()


def _driver_of(target: GPUTarget) -> Any:
    """Triton's driver, which takes the chip as given instead of asking a GPU."""
    driver: Any = next(one.driver for one in backends.values() if one.compiler.supports_target(target))()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_current_target = lambda: target
    return driver
