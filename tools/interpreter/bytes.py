"""Bytes that Triton kernels load and store, counted in the interpreter by kernel and by tensor."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch


@dataclass
class Bytes:
    """How many bytes were loaded and stored."""

    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True)
class Access:
    """The kernel and its argument that bytes are counted for."""

    kernel: str
    argument: str
    address: int  # of the argument's first element


@contextmanager
def counted_flops() -> Iterator[dict[str, int]]:
    """Within this block the FLOPs of every dot are counted for each kernel, including those on padding."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    dot, call = builder.create_dot, executor.__call__
    flops: dict[str, int] = defaultdict(int)
    running: list[str] = []

    def counting_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        flops[running[-1]] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def counting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(self.fn.__name__)
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    with mock.patch.object(builder, "create_dot", counting_dot), mock.patch.object(executor, "__call__", counting_call):
        yield flops


@contextmanager
def counted() -> Iterator[dict[Access, Bytes]]:
    """Within this block all bytes that kernels load and store are counted, without masked elements.

    Repeated loads count each time, also those that a GPU's caches would serve. An access outside of the kernel's arguments
    raises.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    counts: dict[Access, Bytes] = defaultdict(Bytes)
    running: list[tuple[str, dict[str, torch.Tensor]]] = []

    def access(pointers: np.ndarray, mask: np.ndarray) -> Access:
        kernel, tensors = running[-1]
        first, last = int(pointers[mask].min()), int(pointers[mask].max())
        for name, tensor in tensors.items():
            span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            if tensor.data_ptr() <= first <= last < tensor.data_ptr() + span * tensor.element_size():
                return Access(kernel, name.removesuffix("_ptr"), tensor.data_ptr())
        raise AssertionError(f"{kernel}: an access outside of its arguments")

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        if not inside.any():
            return load(self, pointers, mask, *rest)
        count = counts[access(pointers.data, inside)]  # before the load: a wrong address would crash the process
        result = load(self, pointers, mask, *rest)
        count.loaded += int(inside.sum()) * result.data.itemsize
        return result

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        if inside.any():
            counts[access(pointers.data, inside)].stored += int(inside.sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    def counting_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.arg_names, args, strict=False))
        running.append((self.fn.__name__, {n: t for n, t in named.items() if isinstance(t, torch.Tensor) and t.numel()}))
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    with (
        mock.patch.object(builder, "create_masked_load", counting_load),
        mock.patch.object(builder, "create_masked_store", counting_store),
        mock.patch.object(executor, "__call__", counting_call),
    ):
        yield counts


def of_tensor(counts: dict[Access, Bytes], tensor: torch.Tensor) -> Bytes:
    """The bytes that all kernels together loaded from and stored to a tensor, which must have lived throughout the block."""
    found = [count for access, count in counts.items() if access.address == tensor.data_ptr()]
    return Bytes(sum(count.loaded for count in found), sum(count.stored for count in found))


def stored_to(counts: dict[Access, Bytes], *arguments: str) -> int:
    """Bytes stored through arguments of these names."""
    return sum(count.stored for access, count in counts.items() if access.argument in arguments)
