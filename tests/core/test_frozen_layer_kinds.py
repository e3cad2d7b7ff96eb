"""Frozen layers of every kind: their hooks, subclasses and quantised weights keep their effect in an L-MoE layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_kernels import LMoELinear, dispatch, lmoe

F64 = torch.float64


def _with_experts(frozen: nn.Module, **options: Any) -> LMoELinear:
    layer = LMoELinear.from_linear(frozen, num_experts=3, rank=2, **options)
    nn.init.normal_(layer.lora_b)
    return layer


def _delta(layer: LMoELinear, x: Tensor) -> Tensor:
    return lmoe(x, layer.lora_a, layer.lora_b, gate_weight=layer.gate_weight, scaling=layer.scaling)


class _Doubles(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Packed(Tensor):
    """A weight that only `F.linear` can unpack, like a quantised one: its value is twice what it stores."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, 2 * weight.as_subclass(Tensor), *bias)
        return super().__torch_function__(func, types, args, kwargs)


def _packed(frozen: nn.Linear) -> nn.Linear:
    frozen.weight = nn.Parameter(frozen.weight.detach().as_subclass(_Packed), requires_grad=False)
    return frozen


def _hooked(frozen: nn.Linear) -> nn.Linear:
    frozen.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return frozen


@pytest.mark.parametrize(
    "kind", [lambda: _Doubles(8, 12, dtype=F64), *(lambda f=f: f(nn.Linear(8, 12, dtype=F64)) for f in (_packed, _hooked))],
    ids=["subclass", "packed weight", "forward pre-hook"],
)  # fmt: skip
def test_the_frozen_layers_own_behaviour_is_kept(kind: Any) -> None:
    frozen, x = kind(), torch.randn(5, 8, dtype=F64)
    alone = frozen(x)
    layer = _with_experts(frozen)
    torch.testing.assert_close(layer(x), alone + _delta(layer, x))
    plain = F.linear(x, frozen.weight.detach().as_subclass(Tensor), frozen.bias)
    assert (alone - plain).abs().max() > 0.1, "this kind computes what a plain linear layer computes"


@pytest.mark.parametrize("hook", ["register_full_backward_pre_hook", "register_full_backward_hook"])
def test_backward_hooks_of_the_frozen_layer_are_run(hook: str) -> None:
    layer = _with_experts(nn.Linear(8, 12))
    seen: list[nn.Module] = []
    getattr(layer.frozen_layer, hook)(lambda module, *grads: seen.append(module))
    layer(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert seen == [layer.frozen_layer]


class _Codes(nn.Module):
    """A layer without `weight`: it stores its numbers under another name, as a parameter or a buffer, or has none."""

    def __init__(self, codes: Tensor | None, as_parameter: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 12
        if as_parameter and codes is not None:
            self.codes: Any = nn.Parameter(codes, requires_grad=False)
        else:
            self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(*x.shape[:-1], 12)


@pytest.mark.parametrize("as_parameter", [True, False], ids=["parameter", "buffer"])
@pytest.mark.parametrize("dtype", [F64, torch.int32], ids=str)
def test_experts_take_device_and_dtype_of_a_layer_without_weight(dtype: torch.dtype, as_parameter: bool) -> None:
    layer = _with_experts(_Codes(torch.zeros(3, device="meta", dtype=dtype), as_parameter))
    expected = F64 if dtype == F64 else torch.float32
    assert {(p.device.type, p.dtype) for p in (layer.lora_a, layer.lora_b, layer.gate_weight)} == {("meta", expected)}


def test_a_layer_without_any_tensor_gets_experts() -> None:
    layer, x = _with_experts(_Codes(None, as_parameter=False)), torch.randn(5, 8)
    options = {"gate_weight": layer.gate_weight, "scaling": layer.scaling, "base": torch.ones(5, 12)}
    assert torch.equal(layer(x), lmoe(x, layer.lora_a, layer.lora_b, **options))


def test_assigning_bias_sets_the_frozen_layers_bias() -> None:
    layer, bias = _with_experts(nn.Linear(8, 12)), nn.Parameter(torch.randn(12))
    layer.bias = bias
    assert layer.frozen_layer.bias is bias
    assert "bias" not in dict(layer.named_parameters(recurse=False))


def test_the_layers_backend_is_the_one_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dispatch.Backend("none.such", lambda problem: "there is no TPU", lambda problem: None)
    monkeypatch.setitem(dispatch.BACKENDS, "tpu", row)
    layer = _with_experts(nn.Linear(8, 12), backend="tpu")
    with pytest.raises(ValueError, match="got 'tpu': there is no TPU"):
        layer(torch.randn(5, 8))
