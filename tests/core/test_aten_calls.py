"""How many ATen calls the torch backend makes: few tokens cost what the calls cost, so that none may creep in."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_kernels import functional, lmoe, ops
from lmoe_kernels.options import Options
from tests.problems import Case, make_problem
from tools import calls


class _Calls(TorchDispatchMode):
    """Counts the calls of ATen operations: those that compute, and views."""

    def __init__(self) -> None:
        super().__init__()
        self.computing, self.views = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.is_view:
            self.views += 1
        elif not func._schema.name.startswith("aten::new_empty"):
            self.computing += 1
        return func(*args, **(kwargs or {}))


# Computing: forward shrinks, gates (product, softmax), scales, blends, multiplies and expands. The backward computes gates,
# h and v again, shrinks dy, blends it, and has two products for dgates, the softmax's backward, du, three weight gradients
# and two products for dx. In half precision x, gate_weight, u and v change their dtype; u and v again, dv, du and dlogits.
OF_A_LAYER = pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [(torch.float32, 7, 15), (torch.bfloat16, 11, 21)], ids=["float32", "bfloat16"]
)


@OF_A_LAYER
@pytest.mark.parametrize("tokens", [1, 64])
def test_calls_of_a_layer_with_a_gate(tokens: int, dtype: torch.dtype, forward: int, backward: int) -> None:
    t = make_problem(Case(T=tokens, I=48, O=40, E=8, R=16), dtype).tensors
    x, factors, dy = t["x"], calls.factors_of(t), torch.randn(tokens, 40).to(dtype)
    options = Options(scaling=2.0)
    with _Calls() as of_forward:
        _, saved = calls.forward_saved("torch", x, factors, options)
    with _Calls() as of_backward:
        calls.backward("torch", dy, x, factors, saved, options)
    assert (of_forward.computing, of_backward.computing) == (forward, backward)
    assert (of_forward.views, of_backward.views) == (8, 16)


@OF_A_LAYER
def test_no_dropout_adds_no_call(dtype: torch.dtype, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops make the calls of the backend alone, and no seed is drawn; with dropout they make others."""
    t = make_problem(Case(T=64, I=48, O=40, E=8, R=16), dtype).tensors
    x, factors, dy = t["x"], calls.factors_of(t), torch.randn(64, 40).to(dtype)
    wanted = [*calls.everything(factors), False]

    def count(seed: torch.Tensor | None, options: Options) -> tuple[int, int]:
        with _Calls() as of_forward:
            _, saved, _ = ops._compute_forward(x, factors, None, None, seed, options, save=True, backend="torch")
        assert saved is not None
        with _Calls() as of_backward:
            ops._compute_backward(dy, None, x, factors, None, seed, saved, options, wanted=wanted, backend="torch")
        return of_forward.computing, of_backward.computing

    assert count(None, Options(scaling=2.0)) == (forward, backward)
    with_dropout = count(torch.tensor(7), Options(scaling=2.0, dropout=0.5))
    assert all(more > less for more, less in zip(with_dropout, (forward, backward), strict=True))
    monkeypatch.setattr(functional, "new_seed", lambda device: pytest.fail("a seed was drawn"))
    for zero in (0.0, 0):
        lmoe(**t, dropout=zero)
