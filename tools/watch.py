"""Watched allocations: an element that a kernel forgets to write stays NaN, and a write outside a buffer changes a canary.

Of integers it stays the largest of their type, which no kernel takes for a token or an expert.

`torch.utils.deterministic.fill_uninitialized_memory` fills empty tensors too, but has no canaries, and works only under
`torch.use_deterministic_algorithms`, which changes the operations under test.
"""

import pytest
import torch
from torch import Tensor

MARGIN = 128  # elements before and after each buffer; keeps 16-byte alignment in every dtype
CANARY = -1234


class AllocationWatch:
    """Replaces torch.empty, torch.empty_like and Tensor.new_empty: the tensors are full of NaN, between canaries."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch until the test ends."""
        real_empty = torch.empty

        def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
            count = torch.Size(shape).numel()
            buffer = real_empty(count + 2 * MARGIN, dtype=dtype, device=device)
            buffer.fill_(CANARY)
            buffer[MARGIN : MARGIN + count] = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
            self.buffers.append((buffer, count))
            return buffer[MARGIN : MARGIN + count].view(shape)

        def shape_of(size: tuple) -> tuple[int, ...]:
            return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)

        def empty(*size, dtype=None, device=None) -> Tensor:
            return guarded(shape_of(size), dtype or torch.get_default_dtype(), device or torch.device("cpu"))

        def new_empty(self: Tensor, *size, dtype=None, device=None) -> Tensor:
            return guarded(shape_of(size), dtype or self.dtype, device or self.device)

        def empty_like(like: Tensor, *, dtype=None) -> Tensor:
            return guarded(tuple(like.shape), dtype or like.dtype, like.device)

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch, "empty_like", empty_like)
        monkeypatch.setattr(Tensor, "new_empty", new_empty)

    def check(self) -> None:
        """Raise if something was written outside a buffer."""
        for buffer, count in self.buffers:
            margins = torch.cat([buffer[:MARGIN], buffer[MARGIN + count :]])
            assert (margins == CANARY).all(), f"written outside a buffer of {count} elements of {buffer.dtype}"
