"""Named experts: list, add, remove and export them, in layers of both kinds, and what checkpoints say about them."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lmoe_kernels import (
    LMoELinear,
    add_expert,
    apply_lmoe,
    expert_names,
    export_expert,
    lmoe_layers,
    remove_expert,
)
from lmoe_kernels.mixture import LayerWithExperts, Mixture
from tests.integration.test_lora_adapter import lora
from tests.models import IDS, llama, with_experts

NAMES = ["english", "python", "c"]
GATE = math.exp(-4)
Q = "model.layers.0.self_attn.q_proj"


def mixture(**options: Any) -> nn.Module:
    """A model with three experts per layer and random gates."""
    options.setdefault("expert_names", NAMES)
    return with_experts(llama(), mixing="outputs", **options)


def gates(model: nn.Module) -> Tensor:
    """The gates of all tokens of all layers (..., E)."""
    for layer in lmoe_layers(model).values():
        layer.output_router_logits = True
    model(IDS)
    return torch.cat([layer.router_logits.flatten(0, -2).softmax(-1) for layer in lmoe_layers(model).values()])


def everything(model: nn.Module) -> dict[str, Any]:
    """Parameters and options: an error must leave the same objects with the same values."""
    layers = lmoe_layers(model).items()
    return {name: layer.config() for name, layer in layers} | {
        name: (id(p), p.detach().clone().tolist(), p.requires_grad) for name, p in model.named_parameters()
    }


def error_of(model: nn.Module, act: Callable[[], Any]) -> str:
    before = everything(model)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        act()
    assert everything(model) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names() -> None:
    assert expert_names(mixture()) == NAMES
    assert expert_names(mixture(expert_names=None)) == ["0", "1", "2"]
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=1, expert_names=["a", "b"])
    apply_lmoe(model, "k_proj", num_experts=2, rank=1, expert_names=["b", "c"])
    assert expert_names(model) == ["a", "b", "c"]
    remove_expert(model, "c")
    assert {layer.expert_names for layer in lmoe_layers(model).values()} == {("a", "b"), ("b",)}


@pytest.mark.parametrize("mixing", ["outputs", "factors"])
@pytest.mark.parametrize("gate_bias", [None, True, False])
def test_a_new_expert_hardly_changes_the_outputs(mixing: str, gate_bias: bool | None) -> None:
    """In one layer: its gate is at most exp(-4), whatever the input, and the delta of the others shrinks by that share."""
    layer = LMoELinear(6, 5, num_experts=3, rank=2, mixing=mixing, gate_bias=gate_bias is not None, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=3)
    if gate_bias:
        layer.gate_bias.data.copy_(torch.tensor([-40.0, 3.0, 4.0]))
    x = 10 * torch.randn(200, 6, dtype=torch.float64)
    frozen, before = layer.frozen_layer(x), layer(x)
    model = nn.Sequential(layer)
    add_expert(model, "new")
    layer.output_router_logits = True
    after = layer(x)
    gate = layer.router_logits.softmax(-1)[:, 3]
    assert gate.max() <= GATE
    if mixing == "outputs":
        bound = gate[:, None] * (before - frozen).abs()
        assert ((after - before).abs() <= bound * (1 + 1e-9) + 1e-9).all()
    else:
        assert (after - before).norm() <= 0.2 * (before - frozen).norm()
    assert layer.expert_names == ("0", "1", "2", "new")
    assert tuple(layer.gate_bias.shape) == (4,)


def test_equal_gates_give_the_new_one_its_largest_share() -> None:
    model = mixture(gate_init_std=0.0)
    add_expert(model, "new", gate_bias=-2.0)
    expected = math.exp(-2) / (1 + math.exp(-2))
    torch.testing.assert_close(gates(model)[:, 3], torch.full_like(gates(model)[:, 3], expected))
    add_expert(model, "newer", gate_bias=-2.0)
    torch.testing.assert_close(gates(model)[:, 4], torch.full_like(gates(model)[:, 4], expected))


def test_the_others_keep_their_values_and_their_ratio() -> None:
    model = mixture(gate_bias=True)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.gate_bias)
    before, old = gates(model), copy.deepcopy(model.state_dict())
    add_expert(model, "new")
    first = lmoe_layers(model)[Q]
    torch.testing.assert_close(first.lora_a[3].abs().max(), torch.tensor(1 / 4).double(), rtol=0.3, atol=0)
    assert not first.lora_b[3].any()
    for name, tensor in old.items():
        assert torch.equal(model.state_dict()[name][: len(tensor)], tensor)
    after = gates(model)[: before.shape[0] // 4, :3]  # the first layer sees the same input as before
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), before[: after.shape[0]])


def test_the_gate_of_a_new_expert_rises_in_training() -> None:
    """Tokens of one kind need an expert that the others are not."""
    layer = LMoELinear(
        16, 16, num_experts=2, rank=2, alpha=2, mixing="outputs", gate_init_std=0.0, output_router_logits=True
    )
    model, target = nn.Sequential(layer), torch.randn(16, 2) @ torch.randn(2, 16) / 16
    add_expert(model, "new")
    assert layer(torch.randn(3, 16)).shape == (3, 16)
    start = layer.router_logits.softmax(-1)[:, 2].max()
    layer.lora_a.register_hook(lambda gradient: gradient * torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1))
    layer.lora_b.register_hook(lambda gradient: gradient * torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    x = torch.randn(256, 16) + 1
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - layer.frozen_layer(x) - x @ target).square().mean().backward()
        optimizer.step()
    assert start <= GATE
    assert layer.router_logits.softmax(-1)[:, 2].mean() > 0.5


def test_with_top_k_a_new_expert_changes_nothing_at_first() -> None:
    model = mixture(top_k=2, choice_bias=True)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.choice_bias, std=0.1)
    before = model(IDS).logits
    add_expert(model, "new")
    layer = lmoe_layers(model)[Q]
    assert torch.equal(layer.choice_bias[3], layer.choice_bias[:3].mean())
    assert isinstance(dict(layer.named_buffers())["choice_bias"], Tensor)
    assert layer.load.shape == (4,)
    torch.testing.assert_close(model(IDS).logits, before)


def test_a_shared_a_serves_the_new_expert() -> None:
    model = mixture(shared_a=True)
    before = lmoe_layers(model)[Q].lora_a
    add_expert(model, "new")
    layer = lmoe_layers(model)[Q]
    assert layer.lora_a is before
    assert layer.lora_b.shape[0] == 4
    remove_expert(model, "english")
    assert layer.lora_a is before
    model(IDS).logits.sum().backward()


def test_frozen_parameters_stay_frozen() -> None:
    model = mixture()
    for layer in lmoe_layers(model).values():
        layer.lora_a.requires_grad_(False)
        layer.gate_weight.requires_grad_(False)
    for change in (lambda: add_expert(model, "new"), lambda: remove_expert(model, "c")):
        change()
        layer = lmoe_layers(model)[Q]
        trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        assert trained == ["lora_b"]


def test_removing_what_was_added_gives_the_outputs_back() -> None:
    model = mixture()
    before = model(IDS).logits
    add_expert(model, "new")
    remove_expert(model, "new")
    torch.testing.assert_close(model(IDS).logits, before)
    assert lmoe_layers(model)[Q].scaling == 6.0  # alpha=None was twice the number of experts, of which there were three


def test_the_others_share_the_gate_of_a_removed_expert() -> None:
    model = mixture(gate_bias=True)
    left = copy.deepcopy(model)
    for layer in lmoe_layers(left).values():
        layer.gate_bias.data[1] = -torch.inf
    remove_expert(model, "python")
    assert expert_names(model) == ["english", "c"]
    torch.testing.assert_close(model(IDS).logits, left(IDS).logits)
    remove_expert(mixture(expert_names=None), "1")


def saved_lora(directory: Path, **options: Any) -> tuple[nn.Module, Tensor]:
    """A model and the logits that a LoRA gives it in PEFT."""
    plain = llama()
    wrapped = lora(copy.deepcopy(plain), **{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], **options})
    wrapped.save_pretrained(directory)
    return plain, wrapped(IDS).logits


def choose_last(model: nn.Module) -> None:
    for layer in lmoe_layers(model).values():
        layer.gate_weight.data.zero_()
        layer.gate_bias.data[:-1] = -torch.inf


@pytest.mark.parametrize("mixing", ["outputs", "factors"])
def test_an_expert_from_a_lora(mixing: str, tmp_path: Path) -> None:
    plain, expected = saved_lora(tmp_path, target_modules=["q_proj"], use_rslora=True)
    model = copy.deepcopy(plain)
    apply_lmoe(model, ["q_proj", "down_proj"], num_experts=2, rank=3, mixing=mixing)
    add_expert(model, "lora", lora=tmp_path)
    choose_last(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-10, atol=1e-10)
    assert not lmoe_layers(model)["model.layers.0.mlp.down_proj"].lora_a[2].any()
    export_expert(model, "lora", tmp_path / "again")
    again = PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-10, atol=1e-10)


def test_a_lora_that_does_not_fit(tmp_path: Path) -> None:
    saved_lora(tmp_path)
    first = "model.layers.0.mlp.down_proj"
    for options, message in (
        ({"rank": 1}, f"the LoRA of layer '{first}' in {tmp_path} must have at most the layer's rank 1, got 2"),
        ({"rank": 2, "shared_a": True}, f"lora must be None in layers whose experts share one A, got {tmp_path}"),
        ({"rank": 2, "alpha": 0}, f"lora must be None in layers with alpha = 0, got {tmp_path}"),
    ):
        model = llama()
        apply_lmoe(model, ["q_proj", "down_proj"], num_experts=2, **options)
        assert error_of(model, lambda model=model: add_expert(model, "x", lora=tmp_path)) == f"add_expert: {message}"
    narrow = llama()
    narrow.model.layers[0].mlp.down_proj = nn.Linear(3, 3)
    apply_lmoe(narrow, "down_proj", num_experts=2)
    assert error_of(narrow, lambda: add_expert(narrow, "x", lora=tmp_path)).endswith(
        "must have the layer's in_features and out_features (3, 3), got (24, 16)"
    )
    model = llama()
    apply_lmoe(model, ["q_proj"], num_experts=2)
    assert error_of(model, lambda: add_expert(model, "x", lora=tmp_path)) == (
        f"add_expert: {tmp_path} must fit the model's L-MoE layers, got the LoRA of a layer 'model.layers.0.mlp.down_proj' "
        "without experts; nearest: 'model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj'"
    )
    assert "does not exist" in error_of(model, lambda: add_expert(model, "x", lora=tmp_path / "none"))


BAD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "add one of the same name": (
        lambda m: add_expert(m, "c"),
        "add_expert: name must be a new one, got 'c', which the model has: 'english', 'python', 'c'",
    ),
    "add without a name": (lambda m: add_expert(m, ""), "add_expert: name must be a str that is not empty, got ''"),
    "add a number": (lambda m: add_expert(m, 3), "add_expert: name must be a str that is not empty, got 3"),
    "no gate": (
        lambda m: add_expert(m, "x", gate_bias=-math.inf),
        "add_expert: gate_bias must be a finite number, got -inf",
    ),
    "remove an unknown one": (
        lambda m: remove_expert(m, "pyhton"),
        "remove_expert: name must be that of an expert of the model, got 'pyhton'; nearest: 'python'",
    ),
    "export an unknown one": (
        lambda m: export_expert(m, "x", "nowhere"),
        "export_expert: name must be that of an expert of the model, got 'x'; nearest: 'english', 'python', 'c'",
    ),
    "of an unknown adapter": (
        lambda m: add_expert(m, "x", adapter="second"),
        "add_expert: adapter must be one of 'default', got 'second'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind: str) -> None:
    model = mixture()
    act, message = BAD[kind]
    assert error_of(model, lambda: act(model)) == message


def test_the_last_expert_and_those_of_top_k_stay() -> None:
    model = mixture(top_k=2)
    remove_expert(model, "c")
    assert error_of(model, lambda: remove_expert(model, "python")) == (
        "remove_expert: name must leave as many experts as top_k = 2 in every layer, "
        f"got 'python', after which 1 are left in '{Q}'"
    )
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=1, rank=1)
    assert "must leave an expert in every layer, got '0', after which 0 are left" in error_of(
        model, lambda: remove_expert(model, "0")
    )


def test_models_without_experts_without_data_and_distributed(tmp_path: Path) -> None:
    for act in (
        expert_names,
        lambda m: add_expert(m, "x"),
        lambda m: remove_expert(m, "x"),
        lambda m: export_expert(m, "x", tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match=r"model must have L-MoE layers \(see apply_lmoe\), got none"):
            act(llama())
    meta = mixture().to("meta")
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = mixture()
    for act in (lambda m: add_expert(m, "x"), lambda m: remove_expert(m, "c")):
        with pytest.raises(ValueError, match=r"model must have data, got layer '.*' on the meta device"):
            act(meta)
        with pytest.raises(ValueError, match="model must not be distributed, got one in DistributedDataParallel"):
            act(wrapped)
    with pytest.raises(ValueError, match="model must have data"):
        export_expert(meta, "c", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert expert_names(wrapped) == NAMES
    export_expert(wrapped, "c", tmp_path / "x")


class Tuned(nn.Module, LayerWithExperts):
    """A layer of two adapters, like those of a PEFT tuner."""

    def __init__(self, layers: dict[str, LMoELinear]) -> None:
        super().__init__()
        self.layers = layers  # not as modules, which would be layers of the model
        self.active_adapters = ["second"]

    def wrapped(self) -> nn.Module:
        return self.layers["first"].wrapped()

    def active(self) -> list[str]:
        return self.active_adapters

    def mixtures(self) -> dict[str, Mixture]:
        return {name: layer.mixtures()["default"] for name, layer in self.layers.items()}

    def set_mixture(self, adapter: str, mixture: Mixture) -> None:
        self.layers[adapter].set_mixture("default", mixture)

    def keep_router_logits(self, adapter: str, keep: bool) -> None:
        self.layers[adapter].keep_router_logits("default", keep)

    def kept_router_logits(self) -> dict[str, torch.Tensor]:
        return {}

    def loads(self) -> dict[str, torch.Tensor]:
        return {}


def test_a_model_of_several_adapters(tmp_path: Path) -> None:
    layers = {name: LMoELinear(4, 4, num_experts=2, rank=2, expert_names=[f"{name} a", "b"]) for name in ("first", "second")}
    for layer in layers.values():
        nn.init.normal_(layer.lora_b)
    model = nn.ModuleDict({"layer": Tuned(layers)})
    assert expert_names(model) == ["second a", "b"]
    assert expert_names(model, adapter="first") == ["first a", "b"]
    add_expert(model, "new")
    assert layers["second"].config()["expert_names"] == ["second a", "b", "new"]
    assert layers["first"].config()["expert_names"] == ["first a", "b"]
    remove_expert(model, "b", adapter="first")
    assert layers["first"].config()["expert_names"] == ["first a"]
    assert layers["second"].num_experts == 3
    export_expert(model, "first a", tmp_path, adapter="first")
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == [
        f"base_model.model.layer.lora_{factor}.weight" for factor in "AB"
    ]
    model["layer"].active_adapters = ["first", "second"]
    with pytest.raises(
        ValueError, match="adapter must be given for a model of several adapters, got None; the adapters are"
    ):
        expert_names(model)
