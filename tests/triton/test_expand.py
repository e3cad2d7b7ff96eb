"""Expand in chunks of features: every chunk against float64, and the same bits for every length of a chunk."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton.expand import expand_fwd, grouped_expand_fwd
from lmoe_kernels.backends.triton.plans import Tile
from tests.triton.routes import route_of
from tools.interpreter.races import race_checked

T, F = 37, 290  # features in five blocks of 64
TILE = Tile(T=16, F=64, ER=32, E=16)


def _expand(chunk: int, experts: int, ranks: int, base: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in chunks, and in float64."""
    draw = torch.Generator().manual_seed(experts)
    v, factor, dlogits, gate, rows = (
        torch.randn(shape, generator=draw).to(dtype)
        for shape in ((T, experts, ranks), (experts, ranks, F), (T, experts), (experts, F), (T, F))
    )
    out = torch.full((T, F), float("nan"), dtype=dtype)
    given = {"base": rows} if base else {"dlogits": dlogits, "gate_weight": gate}
    with race_checked():
        expand_fwd(v, factor, out, replace(TILE, chunk=chunk), scaling=0.5, **given)
    v, factor, dlogits, gate, rows = (t.double() for t in (v, factor, dlogits, gate, rows))
    product = v.view(T, -1) @ factor.view(-1, F)
    return out, rows + 0.5 * product if base else 0.5 * (product + dlogits @ gate)


@pytest.mark.parametrize("base", [False, True], ids=["gate", "base"])
@pytest.mark.parametrize("experts, ranks", [(4, 6), (4, 13), (20, 1)], ids=["held", "more columns", "more experts"])
@pytest.mark.parametrize("chunk", [128, 1024])
def test_every_chunk(chunk: int, experts: int, ranks: int, base: bool) -> None:
    """A block has all columns, or not those of v, or not those of the gate, which are then loaded in each step."""
    ours, true = _expand(chunk, experts, ranks, base, torch.float32)
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def test_the_chunk_changes_no_bit() -> None:
    whole, *others = (_expand(chunk, 4, 6, False, torch.bfloat16)[0] for chunk in (1024, 0, 192))
    assert all(torch.equal(whole, other) for other in others)


@pytest.mark.parametrize("chunk", [0, 128])
def test_every_chunk_of_tokens_in_groups(chunk: int) -> None:
    """Two slots, of which the second adds to what the first has written."""
    E, R, K = 5, 6, 2
    v, factor = torch.randn(T, K, R), torch.randn(E, R, F)
    kept = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).t().contiguous().int()
    out = torch.full((T, F), float("nan"))
    with race_checked():
        grouped_expand_fwd(v, factor, route_of(kept, E), out, replace(TILE, chunk=chunk), scaling=0.5)
    true = 0.5 * torch.einsum("tkr,ktrf->tf", v.double(), factor.double()[kept.long()])
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)
