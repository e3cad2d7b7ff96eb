"""Tokens whose elements lie past 2^31 in every tensor, behind tokens that take neither memory nor time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.plans import Tile
from tools.far import untouched

BEFORE = 2**30  # tokens: a tensor with two elements for each, and the third slot of a route, reach past 2^31 elements


def behind_many_others(rows: Tensor) -> Tensor:
    """A tensor that ends with these rows, behind zeros that take no memory."""
    far = untouched((BEFORE + len(rows), *rows.shape[1:]), rows.dtype)
    far[BEFORE:] = rows
    return far


def start_the_last_tiles_alone(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels start on the tiles of the last tokens alone, and make their tensors of memory that is not committed."""
    from triton.runtime import interpreter

    launch, builder = host.launch, interpreter.InterpreterBuilder
    program_id = builder.create_get_program_id

    def launch_last(kernel, grid: tuple[int, ...], *args, tile: Tile, **constants) -> None:
        splits = grid[2] if kernel.fn.__name__ == "_wgrad_bwd_kernel" else 1
        programs_of_tile = grid[0] // tile.tiles_of(BEFORE + tokens)  # 0 where programs are not for tiles of tokens
        before = programs_of_tile * (BEFORE // tile.T)
        if "tokens_of_tile" in kernel.arg_names:  # of the sort, whose last tile begins at BEFORE
            before = grid[0] - 1
        in_groups = {"route_ptr", "factor_ptr"} <= set(kernel.arg_names)  # then the few tokens are the first in order
        first = (0 if in_groups else before, 0, splits - 1)
        grid = (grid[0] - before, *grid[1:2], *([1] if splits > 1 else grid[2:]))

        def shifted(self: Any, axis: int) -> Any:
            program = program_id(self, axis)
            program.data += first[axis]
            return program

        with monkeypatch.context() as context:
            context.setattr(builder, "create_get_program_id", shifted)
            launch(kernel, grid, *args, tile=tile, **constants)

    def new_empty(self: Tensor, *size, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        return untouched(torch.Size(size if isinstance(size[0], int) else size[0]), dtype or self.dtype)

    monkeypatch.setattr(host, "launch", launch_last)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: untouched(tuple(like.shape), like.dtype))
