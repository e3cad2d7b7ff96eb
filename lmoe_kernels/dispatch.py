# SPDX-License-Identifier: Apache-2.0
"""The table of backends, and the choice of the backend that computes a call.

Every backend is a folder with the same five modules. `availability` has two functions, which return a reason or None:
`why_not`, why the backend cannot take a call, and `why_not_by_default`, why it is not selected automatically. `forward`,
`backward`, `dropout` and `serving` compute. The automatic choice is the first backend of the table for which both functions
return None. The package imports `availability` at once, the others at the first call.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
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
    """The functions that a backend computes, with the signatures of those in `lmoe_kernels.reference`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    dropout: Callable[..., Any]


@cache
def load(name: str) -> Functions:
    """Import the functions of a backend."""
    package = BACKENDS[name].package
    modules = {part: import_module(f"{package}.{part}") for part in Functions._fields}
    return Functions(*(getattr(module, part) for part, module in modules.items()))


@cache
def load_serving(name: str) -> Callable[..., None]:
    """Import the function of a backend that adds stacked mixtures in place, see `lmoe_kernels.serving`."""
    return import_module(f"{BACKENDS[name].package}.serving").add_stacked


class StackFunctions(NamedTuple):
    """The functions of a backend that computes a stack of projections together, see `lmoe_kernels.stack`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@cache
def load_stack(name: str) -> StackFunctions | None:
    """Import the functions for stacks of a backend; None if it has none, and projections are computed one by one."""
    module = f"{BACKENDS[name].package}.stack"
    if find_spec(module) is None:
        return None
    stack = import_module(module)
    return StackFunctions(stack.forward, stack.backward)


def choose(op: str, problem: Problem, backend: str) -> str:
    """Choose the backend of a call: the named one, or for "auto" the first one that is available and selected by default.

    The choice depends on nothing but the arguments, so the forward and the backward of a call use the same backend.

    Raises:
        ValueError: the named backend cannot take this call.
    """
    if backend == AUTO:
        for name, row in BACKENDS.items():
            if row.why_not_by_default(problem) is None and row.why_not(problem) is None:
                return name
        raise AssertionError("the torch backend takes every call")
    reason = BACKENDS[backend].why_not(problem)
    if reason is not None:
        fail(op, "backend", "be one that can take this call", f"{backend!r}: {reason}")
    return backend


def check_name(op: str, name: str) -> None:
    """Check that the table has a backend of this name.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        fail(op, "backend", f"be None or one of {', '.join(map(repr, BACKENDS))}", repr(name))


def explain_choice(op: str, problem: Problem, backend: str) -> str:
    """Describe the choice: one line for the call, and one for each backend that says why it is taken or not."""
    taken = choose(op, problem, backend)
    lines = [f"{op}: {problem}"]
    for name, row in BACKENDS.items():
        if name == taken:
            verdict = f"taken: {'the first that can take the call' if backend == AUTO else 'selected by name'}"
        elif (reason := row.why_not(problem)) is not None:
            verdict = f"cannot: {reason}"
        elif (reason := row.why_not_by_default(problem)) is not None:
            verdict = f"not taken: {reason}"
        else:
            verdict = f"not taken: {f'{taken!r} comes first' if backend == AUTO else f'{taken!r} was selected by name'}"
        lines.append(f"  {name:<10} {verdict}")
    return "\n".join(lines)


class _Block:
    """An active `with use_backend(name)` block."""

    def __init__(self, name: str | None) -> None:
        self.name = name


class _Blocks(threading.local):
    def __init__(self) -> None:
        self.of_this_thread: list[_Block] = []


# torch.compile guards on these two, but cannot trace a context variable.
_blocks = _Blocks()
_blocks_of_all_threads: list[_Block] = []  # in the order in which they were entered


def _innermost_choice() -> str | None:
    """The backend of this thread's innermost block; if it has no block, that of the last block entered in any thread.

    The second rule is for worker threads: those of autograd, which recompute checkpointed layers, and of DataParallel.
    """
    if not _blocks_of_all_threads:  # the usual call, without a look at the thread
        return None
    # A slice, because another thread may leave its block between a test for emptiness and an access.
    innermost = (_blocks.of_this_thread or _blocks_of_all_threads)[-1:]
    return innermost[0].name if innermost else None


def requested_backend(op: str, backend: str | None) -> str:
    """The backend that a call requests: its argument, else the name given to `use_backend`, else "auto".

    Raises:
        ValueError: the name is unknown.
    """
    if backend is None:
        return _innermost_choice() or AUTO
    check_name(op, backend)
    return backend


@contextmanager
def use_backend(name: BackendName | None) -> Iterator[None]:
    """Select the backend of all calls within a `with` block that do not name one.

    The block applies to the thread that enters it, and to every thread that has entered no such block itself. A function
    that was compiled by torch.compile is compiled again for it. Blocks of several threads may overlap in any order.

    Args:
        name: "cuda", "triton", "torch" or "reference"; None restores the automatic choice.

    Example:
        with use_backend("torch"):
            y = layer(x)

    Raises:
        ValueError: the name is unknown; for a call within the block, the backend cannot take it.
    """
    if name is not None:
        check_name("use_backend", name)
    block, of_this_thread = _Block(name), _blocks.of_this_thread
    of_this_thread.append(block)
    _blocks_of_all_threads.append(block)
    try:
        yield
    finally:
        of_this_thread.remove(block)
        _blocks_of_all_threads.remove(block)
