"""Tensors past 2^31 elements on any machine: of their memory only the pages that are touched are ever there."""

import mmap

import pytest
import torch
from torch import Tensor

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it since 3.13; this is Linux's


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that are not there yet."""
    count = torch.Size(shape).numel()
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no addresses for {count} elements of {dtype}: {error}")
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape) if count else torch.empty(shape, dtype=dtype)


def far_apart(rows: Tensor) -> Tensor:
    """A copy of two rows and more, of which the third begins past 2^31 elements."""
    stride = 2**30 + 8
    memory = untouched(((len(rows) - 1) * stride + rows.shape[1],), rows.dtype)
    return memory.as_strided(tuple(rows.shape), (stride, 1)).copy_(rows)
