"""The table of backends: which there are, which one a call takes, and why not the others.

A row of `BACKENDS` names the module that holds `forward` and `backward`, a function that tells why the backend cannot take
a call, and one that tells why it is not taken unasked; each gives None where there is no reason. The automatic choice walks
the table from the top and takes the first backend without a reason.
"""

import os
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.checks import fail


class Problem(NamedTuple):
    """What a choice depends on: where the tensors lie and how large they are, never what is in them."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    in_features: int
    out_features: int
    num_experts: int
    rank: int

    def __str__(self) -> str:
        sizes = f"T={self.tokens} I={self.in_features} O={self.out_features} E={self.num_experts} R={self.rank}"
        return f"{sizes}, {self.dtype} on {self.device}"


def _anything(problem: Problem) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One row of the table."""

    name: str
    module: str
    why_not: Callable[[Problem], str | None]
    why_not_unasked: Callable[[Problem], str | None] = _anything


def _constant_when_compiled(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """torch.compile asks the function once and does not look into it.

    What `torch.compiler.assume_constant_result` does, without the import of torch._dynamo, and of Triton, that it brings.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def _why_not_triton(problem: Problem) -> str | None:
    if problem.num_experts > 256:
        return f"its kernels take at most 256 experts, not {problem.num_experts}"
    return _why_not_triton_here(problem.device, problem.dtype)


@_constant_when_compiled
def _why_not_triton_here(device: torch.device, dtype: torch.dtype) -> str | None:
    """On the CPU the kernels run in Triton's interpreter, where that is switched on."""
    if not _installed("triton"):
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"its kernels run on GPUs, not on {device.type}"
    if dtype == torch.float64:
        return "its kernels take fp32, bf16 and fp16 on a GPU, not fp64"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0"
    return None


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _why_not_triton_unasked(problem: Problem) -> str | None:
    if problem.device.type == "cpu":
        return "on a CPU only where it is asked for by name"
    return _why_no_launchers_here()


@_constant_when_compiled
def _why_no_launchers_here() -> str | None:
    return _why_no_launchers()


@cache
def _why_no_launchers() -> str | None:
    """Triton compiles its launchers in C where it runs, and small images have not what that takes."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler for its launchers: no gcc, no clang, no CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        return "Triton finds no Python.h for its launchers"
    return None


def _only_by_name(problem: Problem) -> str:
    return "only where it is asked for by name"


def _why_not_cuda(problem: Problem) -> str | None:
    return _why_not_cuda_here(problem.device, problem.dtype)


@_constant_when_compiled
def _why_not_cuda_here(device: torch.device, dtype: torch.dtype) -> str | None:
    return extension.why_not(device, dtype)


def _why_not_cuda_unasked(problem: Problem) -> str | None:
    # expected, not measured: one launch and the lowest launch cost win while the call is bound by latency
    return None if problem.tokens <= 64 else "it is expected to win at T <= 64 alone"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cuda", "lmoe_kernels.backends.cuda", _why_not_cuda, _why_not_cuda_unasked),
        Backend("triton", "lmoe_kernels.backends.triton", _why_not_triton, _why_not_triton_unasked),
        Backend("torch", "lmoe_kernels.backends.torch", _anything),
        Backend("reference", "lmoe_kernels.reference", _anything, _only_by_name),
    )
}


class _Block:
    """A `with use_backend(name)` that is open."""

    def __init__(self, name: str | None) -> None:
        self.name = name


class _BlocksOfThread(threading.local):
    def __init__(self) -> None:
        self.open: list[_Block] = []


# Not a context variable: torch.compile cannot trace one, but guards on these two.
_own = _BlocksOfThread()
_open: list[_Block] = []  # of all threads, in the order in which they were entered


def _preferred() -> str | None:
    """The backend of the innermost block of this thread; where it has none, of the block that any thread entered last.

    The latter is for threads that work for others: autograd's, which recompute checkpointed layers, and DataParallel's.
    """
    innermost = (_own.open or _open)[-1:]  # a slice: another thread may leave its block between two steps
    return innermost[0].name if innermost else None


def choose(op: str, problem: Problem, backend: str | None) -> str:
    """The backend for a call: the named one, else that of `use_backend`, else the first that can.

    Raises:
        ValueError: the name is unknown, or the named backend cannot take this call.
    """
    name = backend if backend is not None else _preferred()
    if name is None:
        # why_not first: a compiled call is then not bound to sizes that only a backend which cannot run would ask for
        return next(b.name for b in BACKENDS.values() if not (b.why_not(problem) or b.why_not_unasked(problem)))
    check_name(op, name)
    reason = BACKENDS[name].why_not(problem)
    if reason is not None:
        fail(op, "backend", "be one that can take this call", f"{name!r}: {reason}")
    return name


def check_name(op: str, name: str) -> None:
    """Raise ValueError for a backend that is not in the table."""
    if not isinstance(name, str) or name not in BACKENDS:
        fail(op, "backend", f"be None or one of {', '.join(map(repr, BACKENDS))}", repr(name))


def explain_choice(op: str, problem: Problem, backend: str | None) -> str:
    """A line for the call, then one for each backend: taken, or why not."""
    name = choose(op, problem, backend)
    by_name = backend is not None or _preferred() is not None
    lines = [f"{op}: {problem}"]
    for row in BACKENDS.values():
        if row.name == name:
            verdict = f"taken: {'asked for by name' if by_name else 'the first of this table that can'}"
        elif (reason := row.why_not(problem)) is not None:
            verdict = f"cannot: {reason}"
        elif (reason := row.why_not_unasked(problem)) is not None:
            verdict = f"not taken: {reason}"
        else:
            verdict = "not taken: not asked for" if by_name else f"not taken: {name!r} stands before it"
        lines.append(f"  {row.name:<10} {verdict}")
    return "\n".join(lines)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within this block, calls that name no backend take this one; None restores the automatic choice.

    It holds for the thread that enters it, and for every thread that has entered no such block itself. A compiled function
    compiles again for it. Blocks of several threads may overlap in any order.

    Example:
        with use_backend("torch"):
            y = layer(x)

    Raises:
        ValueError: the name is unknown; a call within the block that the backend cannot take.
    """
    if name is not None:
        check_name("use_backend", name)
    block, own = _Block(name), _own.open
    own.append(block)
    _open.append(block)
    try:
        yield
    finally:
        own.remove(block)
        _open.remove(block)


@cache
def load(name: str) -> ModuleType:
    """The module of a backend, imported when it is first called."""
    return import_module(BACKENDS[name].module)
