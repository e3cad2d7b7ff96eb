"""The search for races, on kernels that have one of each kind, and on their like that have none."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tools.interpreter.races import race_checked

N = 16


@triton.jit
def _reverse(x_ptr, FENCED: tl.constexpr, N: tl.constexpr):
    """A thread may store to a place before another thread has loaded from it."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + N - 1 - i)
    if FENCED:
        tl.debug_barrier()
    tl.store(x_ptr + i, x)


@triton.jit
def _store_and_load(x_ptr, FENCED: tl.constexpr, N: tl.constexpr):
    """A thread may load from a place before another thread has stored to it."""
    i = tl.arange(0, N)
    tl.store(x_ptr + i, i.to(tl.float32))
    if FENCED:
        tl.debug_barrier()
    x = tl.load(x_ptr + N - 1 - i)
    tl.store(x_ptr + N + i, x)


@triton.jit
def _store_twice(x_ptr, FENCED: tl.constexpr, N: tl.constexpr):
    """Which of two stores is the last depends on the threads."""
    i = tl.arange(0, N)
    tl.store(x_ptr + i, i.to(tl.float32))
    if FENCED:
        tl.debug_barrier()
    tl.store(x_ptr + N - 1 - i, i.to(tl.float32))


@triton.jit
def _in_place(x_ptr, N: tl.constexpr):
    """Every thread stores where it has itself loaded; a second tile is loaded before."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < N - 3, other=0.0) + tl.load(x_ptr + N + i)
    tl.store(x_ptr + i, x, mask=i < N - 3)


@triton.jit
def _shifted(x_ptr, N: tl.constexpr):
    """In place but for one element: the tile that is stored begins within the one that was loaded."""
    i = tl.arange(0, N)
    tl.store(x_ptr + 1 + i, tl.load(x_ptr + i))


@triton.jit
def _neighbours(x_ptr, LOAD_STEP: tl.constexpr, STORE_STEP: tl.constexpr):
    """A program stores to its place in x, and loads from there or from places further on."""
    p = tl.program_id(0)
    x = tl.load(x_ptr + p + LOAD_STEP)
    tl.store(x_ptr + p * STORE_STEP, x)


def _run(kernel: Any, *constants: Any, programs: int = 1) -> None:
    with race_checked():
        kernel[(programs,)](torch.zeros(2 * N), *constants)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (_reverse, "stores where another thread may still load"),
        (_store_and_load, "touches what it stored"),
        (_store_twice, "touches what it stored"),
    ],
)
def test_threads_of_a_program_need_a_barrier(kernel: Any, complaint: str) -> None:
    _run(kernel, True, N)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"{kernel.__name__}: {complaint}.*, with no barrier"):
        _run(kernel, False, N)


def test_a_tile_may_be_stored_to_the_addresses_it_was_loaded_from_but_to_no_others() -> None:
    _run(_in_place, N)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="_shifted: stores where another thread may still load"):
        _run(_shifted, N)


def test_programs_touch_nothing_that_another_one_stores() -> None:
    _run(_neighbours, 0, 1, programs=4)
    _run(_neighbours, 4, 1, programs=4)
    with pytest.raises(AssertionError, match="_neighbours: a program loads what another one stores"):
        _run(_neighbours, 1, 1, programs=4)
    with pytest.raises(AssertionError, match="_neighbours: two programs store to one address"):
        _run(_neighbours, 4, 0, programs=4)
