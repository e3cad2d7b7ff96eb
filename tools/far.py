"""Tensors with more than 2^31 elements on any machine: only the pages that are touched take memory."""

import mmap

import pytest
import torch
from torch import Tensor

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # part of Python from 3.13 on; the number is that of Linux


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in lazily committed memory: a page exists only once it is touched."""
    count = torch.Size(shape).numel()
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for {count} elements of {dtype}: {error}")
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape) if count else torch.empty(shape, dtype=dtype)


def far_apart(rows: Tensor) -> Tensor:
    """A copy of a matrix with its rows so far apart that the third begins after 2^31 elements."""
    stride = 2**30 + 8
    memory = untouched(((len(rows) - 1) * stride + rows.shape[1],), rows.dtype)
    return memory.as_strided(tuple(rows.shape), (stride, 1)).copy_(rows)
