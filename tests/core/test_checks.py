"""Input checks at their limits: bools as counts, bad biases, fp64 under autocast, empty dimensions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmoe_kernels import LMoELinear, explain, lmoe, lmoe_linear, ops
from tests.problems import good_arguments


@pytest.mark.parametrize("count", ["num_experts", "rank", "top_k"])
def test_a_bool_is_not_a_count(count: str) -> None:
    with pytest.raises(TypeError) as caught:
        LMoELinear.from_linear(nn.Linear(8, 12), **{count: True})
    assert str(caught.value) == f"LMoELinear: {count} must be an int, got bool"


@pytest.mark.parametrize(
    ("bias", "error", "text"),
    [
        ([0.0] * 12, TypeError, "bias must be a torch.Tensor, got list"),
        (torch.zeros(12).half(), TypeError, "bias must have dtype torch.float32 like x, got torch.float16"),
        (torch.zeros(12, device="meta"), ValueError, "bias must be on cpu like x, got meta"),
    ],
    ids=["no tensor", "dtype", "device"],
)
def test_bad_bias(bias: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        lmoe_linear(**good_arguments(weight=torch.zeros(12, 16), bias=bias))
    assert str(caught.value) == f"lmoe_linear: {text}"


def test_autocast_does_not_cast_fp64() -> None:
    """Autocast does not cast fp64 in `torch.nn.functional.linear` either."""
    arguments: dict[str, Tensor] = {name: t.double() for name, t in good_arguments(base=torch.randn(2, 12)).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lmoe(**arguments)
    assert y.dtype == torch.float64
    assert torch.equal(y, lmoe(**arguments))


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_autocast_of_every_device_of_the_ops_is_noticed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_HAS_MPS", True)
    assert not ops.autocast_is_on()
    torch.set_autocast_enabled(device, True)
    try:
        assert ops.autocast_is_on()
    finally:
        torch.set_autocast_enabled(device, False)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"lora_b": torch.zeros(8, 5, 12)}, ValueError, "lora_a must have shape (E, R, I) = (8, 5, 16), got (8, 4, 16)"),
        ({"mixing": "sum"}, ValueError, "mixing must be one of 'factors', 'outputs', got 'sum'"),
        ({"top_k": 9}, ValueError, "top_k must be in 1 .. E = 8, got 9"),
    ],
    ids=["x", "lora_b", "mixing", "top_k"],
)
def test_explain_refuses_what_lmoe_refuses(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        explain(**good_arguments(**changes))
    assert str(caught.value) == f"explain: {text}"


@pytest.mark.parametrize(("lead", "tokens"), [((), 1), ((6,), 6), ((2, 0, 3), 0), ((2, 3), 6)], ids=str)
@pytest.mark.parametrize("features", [0, 16])
def test_tokens_are_counted_in_the_leading_dims(lead: tuple[int, ...], tokens: int, features: int) -> None:
    """Tokens without features count too, although they have no elements."""
    x, lora_a, gate_weight = torch.zeros(*lead, features), torch.zeros(8, 4, features), torch.zeros(8, features)
    arguments = good_arguments(x=x, lora_a=lora_a, gate_weight=gate_weight)
    assert explain(**arguments).startswith(f"lmoe: T={tokens} I={features} O=12 E=8 R=4, ")
    assert lmoe(**arguments).shape == (*lead, 12)
