"""The weight gradients' kernels: what they load, tokens that are not there, and splits that must not be empty."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.plans import Chip, Tile, WgradPlan
from lmoe_kernels.backends.triton.wgrad import grouped_wgrad_bwd, wgrad_bwd
from tests.triton.routes import route_of
from tools.interpreter.bytes import counted, of_tensor

CHIP = Chip("interpreter", 1, 1 << 16)
TILE = Tile(T=16, F=32, ER=16, E=16)
E, R = 3, 5


def _surrounded(tokens: int, features: int) -> Tensor:
    """Rows in the middle of a tensor of NaN, which shows in every sum that takes more than the rows."""
    around = torch.full((tokens + 2, features + 40), torch.nan)
    rows = around[1:-1, 16 : 16 + features]
    return rows.copy_(torch.randn(tokens, features))


def _same(ours: Tensor, true: Tensor) -> None:
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("tokens, features", [(1, 1), (33, 31), (48, 70), (70, 33)])
def test_rows_and_coefficients_are_loaded_once_and_nothing_else(
    tokens: int, features: int, splits: int, monkeypatch: pytest.MonkeyPatch, watch
) -> None:
    of_split = configs.ceil_div(tokens, splits)
    plan = WgradPlan(TILE, configs.ceil_div(tokens, of_split), of_split)  # a split ends within a tile
    monkeypatch.setattr(configs, "wgrad_plan", lambda *sizes: plan)
    rows, v, dlogits = _surrounded(tokens, features), torch.randn(tokens, E, R), torch.randn(tokens, E)
    pairs = [(v, torch.empty(E, R, features)), (dlogits, torch.empty(E, features))]
    with counted() as counts:
        grads = wgrad_bwd(rows, pairs, CHIP, scaling=0.5)
    for (coefficients, _), grad in zip(pairs, grads, strict=True):
        _same(grad.flatten(0, -2), 0.5 * coefficients.flatten(1).double().T @ rows.double())
    tiles = configs.ceil_div(features, TILE.F)
    assert of_tensor(counts, rows).loaded == 4 * tokens * features
    assert [of_tensor(counts, one).loaded for one in (v, dlogits)] == [tiles * v.nbytes, tiles * dlogits.nbytes]


@pytest.mark.parametrize("tokens, features", [(1, 1), (33, 31), (48, 70), (70, 33)])
def test_each_expert_loads_its_own_tokens_and_nothing_else(tokens: int, features: int, watch) -> None:
    """The last expert gets no tokens."""
    kept = torch.stack([torch.randperm(E - 1) for _ in range(tokens)], 1).int()
    route = route_of(kept, E)
    rows, v = _surrounded(tokens, features), torch.randn(tokens, E - 1, R)
    with counted() as counts:
        grad = grouped_wgrad_bwd(rows, v, torch.empty(E, R, features), route, TILE, scaling=0.5)
    for expert in range(E):
        of_expert = (expert == kept.T)[..., None] * v.double()  # (T, K, R), zero in the other slots
        _same(grad[expert], 0.5 * of_expert.sum(1).T @ rows.double())
    tiles = configs.ceil_div(features, TILE.F)
    assert of_tensor(counts, rows).loaded == 4 * (E - 1) * tokens * features
    assert of_tensor(counts, v).loaded == tiles * v.nbytes


@pytest.mark.parametrize("tokens, features", [(0, 40), (20, 0)])
def test_without_tokens_or_features_no_kernel_runs(
    tokens: int, features: int, monkeypatch: pytest.MonkeyPatch, watch
) -> None:
    monkeypatch.setattr(host, "launch", lambda *_, **__: pytest.fail("nothing is to be launched"))
    pairs = [
        (torch.empty(tokens, E, R), torch.empty(E, R, features)),
        (torch.empty(tokens, E), torch.empty(E, features, dtype=torch.bfloat16)),
    ]
    grads = wgrad_bwd(torch.empty(tokens, features), pairs, CHIP, scaling=-0.5)
    for (_, parameter), grad in zip(pairs, grads, strict=True):
        assert (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype)
        assert not grad.any()


def test_a_split_without_tokens_is_an_error_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision the kernel lets the compiler assume that there is none, which the interpreter checks."""
    monkeypatch.setattr(configs, "wgrad_plan", lambda *sizes: WgradPlan(TILE, 3, 16))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="Assume failed"):
        wgrad_bwd(torch.randn(20, 40).bfloat16(), [(torch.randn(20, E, R).bfloat16(), torch.empty(E, R, 40))], CHIP)
