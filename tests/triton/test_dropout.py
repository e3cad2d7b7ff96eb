"""The Triton kernel of dropout: tokens whose elements lie past 2^31, what it loads and stores, races."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels import reference
from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.configs import dropout_tile
from lmoe_kernels.backends.triton.dropout import dropout
from lmoe_kernels.backends.triton.plans import Tile
from tools.far import untouched
from tools.interpreter.bytes import counted, of_tensor
from tools.interpreter.races import race_checked

BEFORE, T, F = 2**30, 20, 3  # tokens before the few that are looked at: their elements begin after 2^31 others


def _seed() -> torch.Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, ())


def test_the_last_tokens_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is mapped and not committed, and the last tiles alone are started."""
    from triton.runtime import interpreter

    rows, seed = untouched((BEFORE + T, F), torch.bfloat16), _seed()
    rows[BEFORE:] = torch.randn(T, F)
    launch, builder = host.launch, interpreter.InterpreterBuilder
    program_id = builder.create_get_program_id

    def launch_last(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile, **constants: Any) -> None:
        before = BEFORE // tile.T

        def shifted(self: Any, axis: int) -> Any:
            program = program_id(self, axis)
            program.data += before if axis == 0 else 0
            return program

        with monkeypatch.context() as context:
            context.setattr(builder, "create_get_program_id", shifted)
            launch(kernel, (grid[0] - before, *grid[1:]), *args, tile=tile, **constants)

    arange = torch.arange  # which numbers the tokens in the reference
    with monkeypatch.context() as context, counted():  # which refuses what lies outside of a kernel's arguments
        context.setattr(host, "launch", launch_last)
        context.setattr(torch.Tensor, "new_empty", lambda self, *size, **_: untouched(size, self.dtype))
        result = dropout(rows, seed, 0.5)
    monkeypatch.setattr(torch, "arange", lambda end, **more: arange(end, **more) + (BEFORE if end == T else 0))
    assert torch.equal(result[BEFORE:], reference.dropout(rows[BEFORE:], seed, 0.5))


@pytest.mark.parametrize("features", [1, 33, 2048, 5000])
def test_each_row_is_read_once_and_written_once(features: int) -> None:
    tokens = 70 if features < 5000 else 5
    rows, seed = torch.randn(tokens, features + 5).bfloat16()[:, :features], _seed()
    with counted() as counts:
        result = dropout(rows, seed, 0.25)
    assert of_tensor(counts, rows).loaded == of_tensor(counts, result).stored == tokens * features * 2
    with race_checked():
        assert torch.equal(dropout(rows, seed, 0.25), result)


def test_a_tile_has_the_same_number_of_elements_for_every_width() -> None:
    """But for widths below 16: 16 elements a thread need no spill, and give every thread vectors of 16 bytes."""
    for features in (1, 16, 100, 2048, 5000, 1 << 20):
        tile = dropout_tile(features)
        assert tile.T * tile.F == 2048
        assert min(features, 2048) <= tile.F


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_nothing_is_launched_for_no_elements(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with counted() as counts:
        assert dropout(torch.empty(shape), _seed(), 0.5).shape == shape
    assert not counts
