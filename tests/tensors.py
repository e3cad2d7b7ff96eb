"""Tensors at addresses that PyTorch's own allocations do not have."""

import ctypes

import torch
from torch import Tensor


def off_by_a_byte(t: Tensor) -> Tensor:
    """A tensor of this shape between two elements, as a view of bytes may be."""
    memory = ctypes.create_string_buffer(t.numel() * t.element_size() + 2)
    offset = 1 + ctypes.addressof(memory) % 2
    moved = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    assert moved.data_ptr() % 2 == 1
    return moved


def off_by_an_element(t: Tensor) -> Tensor:
    """The same values in a view of a larger buffer, one element after a multiple of 16 bytes."""
    buffer = torch.empty(t.numel() + 16, dtype=t.dtype)
    first = -buffer.data_ptr() % 16 // t.element_size() + 1
    moved = buffer[first : first + t.numel()].view(t.shape).copy_(t)
    assert moved.data_ptr() % 16 == t.element_size()
    return moved
