"""Races of Triton kernels, found in the interpreter, which runs programs one after another and would never show them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def race_checked() -> Iterator[None]:
    """Within this block a kernel raises if its result could depend on scheduling.

    A program may load or store again an address that it has stored to, and store to one that it has loaded, only after a
    barrier, since other threads may do the first access. Exception: a tile may be stored to exactly the addresses that it
    was loaded from, because each thread then stores where it has itself loaded. No other program of a launch may touch at
    all what one program stores.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launches: list[_Launch] = []

    def checking_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].touch(self.grid_idx, _addresses(pointers, mask), stores=False)
        return load(self, pointers, mask, *rest)

    def checking_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].touch(self.grid_idx, _addresses(pointers, mask), stores=True)
        return store(self, pointers, value, mask, *rest)

    def checking_barrier(self: Any) -> None:
        launches[-1].barrier()

    def checking_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(_Launch(self.fn.__name__))
        try:
            result = call(self, *args, **kwargs)
            launches[-1].check_programs()
        finally:
            launches.pop()
        return result

    with (
        mock.patch.object(builder, "create_masked_load", checking_load),
        mock.patch.object(builder, "create_masked_store", checking_store),
        mock.patch.object(builder, "create_barrier", checking_barrier),
        mock.patch.object(executor, "__call__", checking_call),
    ):
        yield


def _addresses(pointers: Any, mask: Any) -> np.ndarray:
    return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]


def _overlap(these: np.ndarray, those: np.ndarray) -> bool:
    """Whether an address is in both; most pairs lie in different tensors, so their ranges are compared first."""
    if not (these.size and those.size) or these.max() < those.min() or those.max() < these.min():
        return False
    return bool(np.isin(these, those).any())


class _Launch:
    """The addresses that the programs of one launch touch."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.program: Any = None
        self.since_barrier: dict[str, list[np.ndarray]] = {"loaded": [], "stored": []}  # by the current program
        self.loaded: dict[Any, list[np.ndarray]] = {}
        self.stored: dict[Any, list[np.ndarray]] = {}

    def barrier(self) -> None:
        for addresses in self.since_barrier.values():
            addresses.clear()

    def touch(self, program: Any, addresses: np.ndarray, stores: bool) -> None:
        if program != self.program:
            self.program = program
            self.barrier()
        for before in self.since_barrier["stored"]:
            assert not _overlap(addresses, before), f"{self.kernel}: touches what it stored, with no barrier between"
        for before in self.since_barrier["loaded"] if stores else ():
            in_place = np.array_equal(addresses, before)  # every thread stores where it has itself loaded
            assert in_place or not _overlap(addresses, before), (
                f"{self.kernel}: stores where another thread may still load, with no barrier between"
            )
        what, by_program = ("stored", self.stored) if stores else ("loaded", self.loaded)
        self.since_barrier[what].append(addresses)
        by_program.setdefault(program, []).append(addresses)

    def check_programs(self) -> None:
        """Check that no address which one program stores to is touched by another."""
        stored = {program: np.unique(np.concatenate(parts)) for program, parts in self.stored.items()}
        everything = np.concatenate([*stored.values(), np.empty(0, np.uint64)])
        assert len(np.unique(everything)) == len(everything), f"{self.kernel}: two programs store to one address"
        for program, parts in self.loaded.items():
            of_others = np.setdiff1d(everything, stored.get(program, []))
            assert not np.isin(np.unique(np.concatenate(parts)), of_others).any(), (
                f"{self.kernel}: a program loads what another one stores"
            )
