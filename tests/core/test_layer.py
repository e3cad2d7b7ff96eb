"""LMoELinear in the place of nn.Linear: it starts as the frozen layer; copies, casts, hooks and torch.compile work."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmoe_kernels import LMoELinear, dispatch, lmoe
from tests.problems import Case, Problem, plain_pytorch, truth
from tools.error_rule import assert_no_worse


def _trained(layer: LMoELinear) -> LMoELinear:
    nn.init.normal_(layer.lora_b, std=0.1)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_new_layer_is_the_frozen_layer(bias: bool, dtype: torch.dtype) -> None:
    """Bitwise, or up to rounding if the GEMM library sums in another order."""
    linear = nn.Linear(96, 80, bias=bias, dtype=dtype)
    layer = LMoELinear.from_linear(copy.deepcopy(linear), num_experts=4, rank=8)
    x = torch.randn(33, 96, dtype=dtype)
    assert_no_worse("y", layer(x), [linear(x)], copy.deepcopy(linear).double()(x.double()))


def test_arguments_come_in_the_order_of_nn_linear() -> None:
    layer = LMoELinear(12, 20, False, "cpu", torch.float64, num_experts=3, rank=2, alpha=4)
    assert (layer.in_features, layer.out_features, layer.frozen_layer.bias) == (12, 20, None)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert (layer.lora_a.shape, layer.lora_b.shape, layer.gate_weight.shape) == ((3, 2, 12), (3, 2, 20), (3, 12))
    assert layer.scaling == 2.0


def test_forward_is_base_and_delta() -> None:
    options = {"alpha": 6, "top_k": 2, "mixing": "outputs", "shared_a": True, "dtype": torch.float64}
    layer = _trained(LMoELinear(12, 20, num_experts=5, rank=3, **options))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    delta = lmoe(
        x, layer.lora_a, layer.lora_b, gate_weight=layer.gate_weight, scaling=2.0, top_k=2, mixing="outputs"
    )  # fmt: skip
    torch.testing.assert_close(layer(x), layer.frozen_layer(x) + delta)


def test_only_experts_and_gate_are_trained() -> None:
    layer = _trained(LMoELinear(12, 20, num_experts=5, rank=3))
    layer(torch.randn(4, 12)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_a", "lora_b", "gate_weight"}
    assert layer.num_trainable_parameters == 5 * (3 * (12 + 20) + 12)


def test_the_initial_state_is_that_of_peft() -> None:
    layer = LMoELinear(4096, 64, num_experts=8, rank=16, gate_init_std=0.5)
    bound = 1 / 64
    assert layer.lora_a.abs().max() <= bound
    assert 0.9 * bound < layer.lora_a.std() * 3**0.5 < 1.1 * bound
    assert (layer.lora_b == 0).all()
    assert 0.45 < layer.gate_weight.std() < 0.55


class _Quantised(nn.Module):
    """A layer that is not nn.Linear: an int8 weight and a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_frozen_layer_is_called_and_gets_the_delta(dtype: torch.dtype) -> None:
    base = _Quantised(nn.Linear(16, 24, bias=False))
    layer = _trained(LMoELinear.from_linear(base, num_experts=4, rank=2))
    assert layer.lora_a.dtype == torch.float32  # not the weight's int8
    x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert (y.dtype, base.calls) == (dtype, 1)
    tensors = {"x": x, "lora_a": layer.lora_a, "lora_b": layer.lora_b, "gate_weight": layer.gate_weight}
    delta = Problem(Case(T=5, I=16, O=24, E=4, R=2, scaling=layer.scaling), tensors, torch.zeros(5, 24), torch.zeros(5, 4))
    plain = [base(x) + results["y"] for results in plain_pytorch(delta)]
    assert_no_worse("y", y, plain, base(x).double() + truth(delta)["y"])
    y.sum().backward()
    assert layer.lora_a.grad is not None
    assert x.grad is not None


def test_any_frozen_layer_under_autocast() -> None:
    layer = _trained(LMoELinear(16, 24, num_experts=4, rank=2))
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        options = {"gate_weight": layer.gate_weight, "scaling": layer.scaling}
        delta = lmoe(x, layer.lora_a, layer.lora_b, base=layer.frozen_layer(x), **options)
        layer.frozen_layer.register_forward_hook(lambda module, args, y: None)  # so that its own forward is called
        assert torch.equal(layer(x), delta)


def test_hooks_of_the_frozen_layer_are_run() -> None:
    layer = _trained(LMoELinear(8, 8, num_experts=2, rank=2, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64)
    plain, seen = layer(x), []
    layer.frozen_layer.register_forward_hook(lambda module, args, y: seen.append(1) or y + 1)
    torch.testing.assert_close(layer(x), plain + 1)
    assert seen == [1]


def test_a_forward_that_replaces_the_frozen_layers_is_called() -> None:
    """Accelerate replaces it in order to load an offloaded weight."""
    layer = _trained(LMoELinear(8, 8, num_experts=2, rank=2, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64)
    plain, own = layer(x), layer.frozen_layer.forward
    layer.frozen_layer.forward = lambda x: own(x) + 1
    torch.testing.assert_close(layer(x), plain + 1)


def test_weight_and_bias_are_the_frozen_layers() -> None:
    layer = LMoELinear(8, 12, num_experts=3, rank=2)
    assert layer.weight is layer.frozen_layer.weight
    assert layer.bias is layer.frozen_layer.bias
    embedding = nn.Embedding(12, 8)
    layer.weight = embedding.weight
    assert layer.frozen_layer.weight is embedding.weight
    assert set(dict(layer.named_parameters(recurse=False))) == {"lora_a", "lora_b", "gate_weight"}


def test_deepcopy_state_dict_and_repr() -> None:
    layer = _trained(LMoELinear(8, 12, num_experts=3, rank=2, top_k=2, shared_a=True, output_router_logits=True))
    x = torch.randn(2, 5, 8)
    y = layer(x)
    assert layer.router_logits is not None
    assert layer.router_logits.shape == (2, 5, 3)
    copied = copy.deepcopy(layer)
    assert copied.router_logits is None
    assert torch.equal(copied(x), y)
    other = LMoELinear(8, 12, num_experts=3, rank=2, top_k=2, shared_a=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert set(layer.state_dict()) == {"frozen_layer.weight", "frozen_layer.bias", "lora_a", "lora_b", "gate_weight"}
    shown = "in_features=8, out_features=12, num_experts=3, rank=2, scaling=4.0, mixing=factors, top_k=2, shared_a=True"
    assert shown in repr(layer)


def test_to_dtype_and_meta_device() -> None:
    layer = LMoELinear(8, 12, num_experts=3, rank=2, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer = layer.to_empty(device="cpu").to(torch.bfloat16)
    layer.reset_parameters()
    layer.frozen_layer.reset_parameters()
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(4, 8).bfloat16()).isfinite().all()


def test_fp32_experts_on_a_half_precision_layer() -> None:
    linear = nn.Linear(8, 12, dtype=torch.bfloat16)
    layer = _trained(LMoELinear.from_linear(linear, dtype=torch.float32, num_experts=3, rank=2))
    layer(torch.randn(4, 8).bfloat16()).float().square().sum().backward()
    assert layer.lora_a.grad is not None
    assert layer.lora_a.grad.dtype == torch.float32


def test_compiles_and_trains() -> None:
    layer = _trained(LMoELinear(8, 12, num_experts=3, rank=2, output_router_logits=True, dtype=torch.float64))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x))
    (compiled(x).sum() + layer.router_logits.sum()).backward()
    assert layer.gate_weight.grad is not None


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_experts_are_at_least_fp32_unless_a_dtype_is_given(frozen: torch.dtype, expected: torch.dtype) -> None:
    """In half precision most updates of an optimizer are smaller than the rounding error."""
    layer = LMoELinear(8, 12, dtype=frozen, num_experts=3, rank=2)
    assert {p.dtype for p in layer.parameters(recurse=False)} == {expected}
    assert layer.weight.dtype == frozen
    wrapped = LMoELinear.from_linear(nn.Linear(8, 12, dtype=frozen), num_experts=3, rank=2)
    assert {p.dtype for p in wrapped.parameters(recurse=False)} == {expected}
    given = LMoELinear.from_linear(nn.Linear(8, 12, dtype=frozen), dtype=frozen, num_experts=3, rank=2)
    assert {p.dtype for p in given.parameters(recurse=False)} == {frozen}


def test_router_logits_are_those_of_the_last_forward_or_none() -> None:
    layer = LMoELinear(8, 12, num_experts=3, rank=2, output_router_logits=True)
    layer(torch.randn(4, 8))
    with pytest.raises(ValueError, match="lora_a must have shape"):
        layer(torch.randn(4, 7))
    assert layer.router_logits is None, "the logits of an earlier batch were kept"
    layer(torch.randn(4, 8))
    layer.output_router_logits = False
    layer(torch.randn(4, 8))
    assert layer.router_logits is None


KNOWN_BACKENDS = ", ".join(map(repr, dispatch.BACKENDS))
BAD = [
    ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
    ({"rank": 2.0}, TypeError, "rank must be an int, got float"),
    ({"top_k": 9}, ValueError, "top_k must be in 1 .. E = 8, got 9"),
    ({"renormalize": "yes"}, TypeError, "renormalize must be a bool, got str"),
    ({"shared_a": 1}, TypeError, "shared_a must be a bool, got int"),
    ({"gate_bias": 1.0}, TypeError, "gate_bias must be a bool, got float"),
    ({"output_router_logits": None}, TypeError, "output_router_logits must be a bool, got NoneType"),
    ({"mixing": "mean"}, ValueError, "mixing must be one of 'factors', 'outputs', got 'mean'"),
    ({"alpha": "16"}, TypeError, "alpha must be None or a finite number, got str"),
    ({"alpha": float("nan")}, ValueError, "alpha must be None or a finite number, got nan"),
    ({"alpha": 10**400}, ValueError, "alpha must be None or a finite number, got an integer beyond the range of a float"),
    ({"gate_init_std": float("inf")}, ValueError, "gate_init_std must be None or a number of at least 0, got inf"),
    ({"gate_init_std": -0.1}, ValueError, "gate_init_std must be None or a number of at least 0, got -0.1"),
    ({"backend": 3}, ValueError, f"backend must be None or one of {KNOWN_BACKENDS}, got 3"),
    ({"backend": []}, ValueError, f"backend must be None or one of {KNOWN_BACKENDS}, got []"),
    (
        {"r": 8, "lora_alpha": 16},
        TypeError,
        "options must be among 'num_experts', 'rank', 'alpha', 'mixing', 'top_k', 'renormalize', 'shared_a', "
        "'gate_bias', 'choice_bias', 'expert_names', 'router', 'router_reads', 'dropout', 'gate_init_std', "
        "'output_router_logits', 'backend', "
        "got 'r' (did you mean 'rank'?), 'lora_alpha' (did you mean 'alpha'?)",
    ),
    (
        {"dtype": torch.int8},
        TypeError,
        "dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64, got torch.int8",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_options(options: dict, error: type[Exception], text: str) -> None:
    linear = nn.Linear(8, 12)
    with pytest.raises(error) as caught:
        LMoELinear.from_linear(linear, **options)
    assert str(caught.value) == f"LMoELinear: {text}"
    assert linear.weight.requires_grad, "an error must leave the layer as it was"


def test_bad_layer() -> None:
    with pytest.raises(TypeError) as caught:
        LMoELinear.from_linear(nn.ReLU())
    assert str(caught.value) == "LMoELinear: linear must be a module with in_features and out_features, got ReLU"
