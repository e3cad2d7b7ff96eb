"""The table of backends: which there are, which one a call takes, and why not the others.

Every backend is a folder of the same three files: `availability` says why it cannot take a call, and why it does not by
default, each None where there is no reason; `forward` and `backward` compute. The automatic choice walks the table from the
top and takes the first backend without a reason. Availability is imported with the package, the rest at the first call.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

from lmoe_kernels.checks import fail
from lmoe_kernels.options import Problem

BackendName = Literal["cuda", "triton", "torch", "reference"]
AUTO = "auto"


class Backend(NamedTuple):
    """One row of the table."""

    package: str
    why_not: Callable[[Problem], str | None]
    why_not_by_default: Callable[[Problem], str | None]


def _row(package: str) -> Backend:
    availability = import_module(f"{package}.availability")
    return Backend(package, availability.why_not, availability.why_not_by_default)


BACKENDS = {name: _row(f"lmoe_kernels.backends.{name}") for name in get_args(BackendName)}


class Functions(NamedTuple):
    """What a backend computes with: the contract is that of `lmoe_kernels.reference`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@cache
def load(name: str) -> Functions:
    """The functions of a backend, imported when it is first called."""
    package = BACKENDS[name].package
    modules = {part: import_module(f"{package}.{part}") for part in Functions._fields}
    return Functions(modules["forward"].forward, modules["backward"].backward)


def choose(op: str, problem: Problem, backend: str) -> str:
    """The backend for a call: the named one, or for "auto" the first that can and does by default.

    A pure function of its arguments: forward and backward of one call choose alike.

    Raises:
        ValueError: the named backend cannot take this call.
    """
    if backend == AUTO:
        return next(name for name, row in BACKENDS.items() if not (row.why_not_by_default(problem) or row.why_not(problem)))
    reason = BACKENDS[backend].why_not(problem)
    if reason is not None:
        fail(op, "backend", "be one that can take this call", f"{backend!r}: {reason}")
    return backend


def check_name(op: str, name: str) -> None:
    """Raise ValueError for a backend that is not in the table."""
    if not isinstance(name, str) or name not in BACKENDS:
        fail(op, "backend", f"be None or one of {', '.join(map(repr, BACKENDS))}", repr(name))


def explain_choice(op: str, problem: Problem, backend: str) -> str:
    """A line for the call, then one for each backend: taken, or why not."""
    taken = choose(op, problem, backend)
    lines = [f"{op}: {problem}"]
    for name, row in BACKENDS.items():
        if name == taken:
            verdict = f"taken: {'the first of this table that can' if backend == AUTO else 'asked for by name'}"
        elif (reason := row.why_not(problem)) is not None:
            verdict = f"cannot: {reason}"
        elif (reason := row.why_not_by_default(problem)) is not None:
            verdict = f"not taken: {reason}"
        else:
            verdict = f"not taken: {taken!r} stands before it" if backend == AUTO else "not taken: not asked for"
        lines.append(f"  {name:<10} {verdict}")
    return "\n".join(lines)


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


def asked_for(op: str, backend: str | None) -> str:
    """The name that travels with a call: the given one, else that of `use_backend`, else "auto".

    Raises:
        ValueError: the name is unknown.
    """
    if backend is None:
        return _preferred() or AUTO
    check_name(op, backend)
    return backend


@contextmanager
def use_backend(name: BackendName | None) -> Iterator[None]:
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
