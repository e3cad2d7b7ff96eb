"""Options of a layer that its forward gives to the operation: dropout, the names of its experts, the bias of the choice."""

import copy

import pytest
import torch
from torch import nn

from lmoe_kernels import LMoELinear, apply_lmoe, lmoe_linear, load_lmoe, reference, save_lmoe
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.mixture import Mixture


def layer_with(**options) -> LMoELinear:
    layer = LMoELinear(12, 10, dtype=torch.float64, num_experts=4, rank=3, **options)
    nn.init.normal_(layer.lora_b)
    return layer


def test_dropout_acts_in_training_on_what_a_sees() -> None:
    layer, x = layer_with(dropout=0.4), torch.randn(5, 12, dtype=torch.float64)
    frozen = layer.frozen_layer
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, ())
    x_of_a = x * reference.keep_mask(seed, 5, 12, 0.4) / 0.6
    logits = x @ layer.gate_weight.T
    delta = lmoe_linear(
        x_of_a, torch.zeros_like(frozen.weight), None, layer.lora_a, layer.lora_b, gate_logits=logits, scaling=layer.scaling
    )
    torch.testing.assert_close(dropped, frozen(x) + delta)
    assert not torch.equal(layer(x), dropped)


def test_evaluation_has_no_dropout() -> None:
    layer, x = layer_with(dropout=0.4).eval(), torch.randn(5, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    plain.dropout = 0.0
    assert torch.equal(layer(x), plain.train()(x))


def test_dropout_is_an_option_of_new_layers_and_not_of_a_checkpoint(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    apply_lmoe(model, ["0"], num_experts=2, rank=2, dropout=0.25)
    assert model[0].dropout == 0.25
    save_lmoe(model, tmp_path)
    again = nn.Sequential(nn.Linear(6, 6))
    load_lmoe(again, tmp_path)
    assert again[0].dropout == 0.0
    load_lmoe(model, tmp_path)
    assert model[0].dropout == 0.25
    with_dropout = nn.Sequential(nn.Linear(6, 6))
    load_lmoe(with_dropout, tmp_path, dropout=0.5)
    assert with_dropout[0].dropout == 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, "dropout must be a number of at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must be a number of at least 0 and below 1, got -0.1"),
        ({"dropout": float("nan")}, ValueError, "dropout must be a number of at least 0 and below 1, got nan"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number of at least 0 and below 1, got str"),
        ({"expert_names": "abcd"}, TypeError, "expert_names must be None or several str that are not empty, got 'abcd'"),
        ({"expert_names": ["a", "b", "c", ""]}, TypeError, "expert_names must be None or several str that are not empty"),
        (
            {"expert_names": ["a", "b"]},
            ValueError,
            "expert_names must have one name for each of num_experts = 4 experts, got 2",
        ),
        ({"expert_names": [*"abca"]}, ValueError, "expert_names must all be different, got two experts of the name 'a'"),
        (
            {"choice_bias": True},
            ValueError,
            "choice_bias must be False unless top_k is given and renormalize is True, got top_k=None, renormalize=True",
        ),
        ({"choice_bias": True, "top_k": 2, "renormalize": False}, ValueError, "choice_bias must be False unless top_k"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^LMoELinear: {message}"):
        layer_with(**options)


def test_names_of_experts_travel_with_a_checkpoint(tmp_path) -> None:
    names = ["prose", "code"]
    model = nn.Sequential(nn.Linear(6, 6))
    apply_lmoe(model, ["0"], num_experts=2, rank=2, expert_names=names)
    save_lmoe(model, tmp_path)
    again = nn.Sequential(nn.Linear(6, 6))
    load_lmoe(again, tmp_path)
    assert again[0].expert_names == ("prose", "code")
    others = nn.Sequential(nn.Linear(6, 6))
    apply_lmoe(others, ["0"], num_experts=2, rank=2)
    assert others[0].expert_names == ("0", "1")
    with pytest.raises(ValueError, match="load_lmoe"):
        load_lmoe(others, tmp_path)


@pytest.mark.parametrize("gate_bias", [False, True])
def test_the_bias_of_the_choice_changes_which_experts_are_chosen_and_not_their_gates(gate_bias: bool) -> None:
    layer, x = (
        layer_with(top_k=2, choice_bias=True, gate_bias=gate_bias, output_router_logits=True),
        torch.randn(2, 7, 12, dtype=torch.float64),
    )
    assert layer.choice_bias.dtype == torch.float32
    layer.choice_bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
    if gate_bias:
        nn.init.normal_(layer.gate_bias)
    y = layer(x)
    logits = nn.functional.linear(x, layer.gate_weight, layer.gate_bias)
    torch.testing.assert_close(layer.router_logits, logits)
    two = {"gate_logits": logits[..., [0, 2]], "scaling": layer.scaling}
    frozen = layer.frozen_layer
    expected = lmoe_linear(x, frozen.weight, frozen.bias, layer.lora_a[[0, 2]], layer.lora_b[[0, 2]], **two)
    torch.testing.assert_close(y, expected)
    assert layer.load.tolist() == [14, 0, 14, 0]
    layer.eval()(x)
    assert layer.load.tolist() == [14, 0, 14, 0]


def test_the_bias_of_the_choice_is_saved_and_never_trained(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    apply_lmoe(model, ["0"], num_experts=3, rank=2, top_k=2, choice_bias=True)
    model[0].choice_bias.copy_(torch.randn(3))
    save_lmoe(model, tmp_path)
    again = nn.Sequential(nn.Linear(6, 6))
    load_lmoe(again, tmp_path)
    assert torch.equal(again[0].choice_bias, model[0].choice_bias)
    assert {name for name, _ in again[0].named_parameters(recurse=False)} == {"lora_a", "lora_b", "gate_weight"}
    assert "load" not in model[0].state_dict()


def test_a_mixture_can_be_replaced_by_one_of_another_size() -> None:
    layer = layer_with(expert_names=[*"abcd"], gate_init_std=0.5)
    (mixture,) = layer.mixtures().values()
    config, x = mixture.config._replace(num_experts=2, expert_names=("c", "a"), gate_bias=True), torch.randn(3, 12).double()
    tensors = {key: nn.Parameter(tensor[[2, 0]].detach()) for key, tensor in mixture.tensors.items()}
    bias = torch.tensor([0.0, -1.0], dtype=torch.float64)
    layer.set_mixture("default", Mixture(config, {**tensors, "gate_bias": bias}))
    assert layer.lora_a is tensors["lora_a"]
    assert layer.expert_names == ("c", "a")
    assert layer.config()["num_experts"] == 2
    expected = lmoe_linear(
        x, layer.frozen_layer.weight, layer.frozen_layer.bias, tensors["lora_a"], tensors["lora_b"],
        gate_weight=tensors["gate_weight"], gate_bias=bias, scaling=layer.scaling,
    )  # fmt: skip
    assert torch.equal(layer(x), expected)
    assert LayerConfig(**{**layer.config(), "gate_init_std": 0.5}) == config._replace(expert_names=["c", "a"])
