"""The layer of the PEFT tuner: equal to `LMoELinear` bit for bit, with one or several active adapters."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lmoe_kernels import LMoELinear
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.mixture import Mixture
from lmoe_kernels.peft import LMoEConfig, LMoETunerLinear
from lmoe_kernels.targets import layers_with_experts
from tests.integration.peft.tuned import NAMES, TARGETS, config, fill, logits, state, trained, tuned, tuner_layers, twin
from tests.models import IDS, llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS = {
    "defaults": {},
    "outputs": {"mixing": "outputs", "lora_alpha": 5},
    "top_k": {"top_k": 2, "gate_bias": True},
    "of all": {"top_k": 2, "renormalize": False, "use_rslora": True, "lora_alpha": 3.0},
    "shared": {"shared_a": True},
    "choice": {"top_k": 2, "choice_bias": True},
    "dropout": {"lora_dropout": 0.3},
}


def with_layer(linear: nn.Module, dtype: torch.dtype | None = None, **options) -> tuple[nn.Module, LMoETunerLinear]:
    """A model of one layer with experts."""
    model = nn.Sequential(linear)
    given = {"num_experts": 3, "r": 2, "target_modules": ["0"], **options}
    inject_adapter_in_model(LMoEConfig(**given), model)
    fill(model)
    layer = model[0]
    assert isinstance(layer, LMoETunerLinear)
    if dtype is not None:
        layer.cast("default", dtype)
    return model, layer


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_those_of_lmoe_linear_bitwise(name: str) -> None:
    plain = llama()
    model = tuned(copy.deepcopy(plain), output_router_logits=True, **OPTIONS[name]).train()
    other = twin(model, plain)
    results = []
    for one in (model, other):
        torch.manual_seed(3)  # of the dropout
        output = one(input_ids=IDS, labels=IDS)
        output.loss.backward()
        results.append(output.logits)
    assert torch.equal(*results)
    assert not torch.equal(results[0], logits(plain))
    theirs = layers_with_experts(other)
    for layer_name, layer in tuner_layers(model).items():
        ours, expected = layer.mixtures()["default"], theirs[layer_name].mixtures()["default"]
        assert ours.config == expected.config
        assert ours.tensors.keys() == expected.tensors.keys()
        for key, tensor in ours.tensors.items():
            assert torch.equal(tensor, expected.tensors[key])
            if key != "choice_bias":
                assert tensor.grad is not None
                assert torch.equal(tensor.grad, expected.tensors[key].grad), key
        assert torch.equal(layer.kept_router_logits()["default"], theirs[layer_name].kept_router_logits()["default"])
        if "choice_bias" in ours.tensors:
            counted = layer.lmoe_load.get_buffer("default")
            assert torch.equal(counted, theirs[layer_name].load)
            assert counted.sum() == 2 * IDS.numel()


def test_a_new_adapter_changes_nothing() -> None:
    plain = llama()
    expected = logits(plain)
    assert torch.equal(logits(get_peft_model(plain, config())), expected)


def test_the_initial_tensors_are_drawn_like_those_of_lmoe_linear() -> None:
    linear = nn.Linear(6, 5)
    torch.manual_seed(4)
    layer = LMoELinear.from_linear(copy.deepcopy(linear), num_experts=3, rank=2)
    torch.manual_seed(4)
    model = nn.Sequential(linear)
    inject_adapter_in_model(LMoEConfig(num_experts=3, r=2, target_modules=["0"]), model)
    ours, theirs = model[0].mixtures()["default"], layer.mixtures()["default"]
    assert ours.config == theirs.config
    assert all(torch.equal(tensor, theirs.tensors[key]) for key, tensor in ours.tensors.items())


def test_active_adapters_add_up() -> None:
    plain = llama()
    model = tuned(copy.deepcopy(plain), adapter="a")
    model.add_adapter("b", config(num_experts=2, r=3, mixing="outputs", target_modules=["q_proj"]))
    fill(model, "b")
    x = torch.randn(7, 16, dtype=torch.float64)
    layers = tuner_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            base = plain.get_submodule(name)
            x = torch.randn(7, layer.in_features, dtype=torch.float64)
            layer.set_adapter(["a", "b"])
            both = layer(x)
            layer.set_adapter("a")
            of_a = layer(x) - base(x)
            layer.set_adapter("b")
            of_b = layer(x) - base(x)
            assert of_a.any()
            assert of_b.any() == ("q_proj" in name)
            torch.testing.assert_close(both, base(x) + of_a + of_b)


@pytest.mark.parametrize("kind", ["Conv1D", "called", "with arguments"])
def test_other_base_layers(kind: str) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, factor: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
            return super().forward(x) * factor + shift

    linear = Conv1D(5, 6) if kind == "Conv1D" else Scaled(6, 5)
    _, layer = with_layer(linear.double())
    x = torch.randn(4, 6, dtype=torch.float64)
    arguments, keywords = ((3.0,), {"shift": 2.0}) if kind == "with arguments" else ((), {})
    got = layer(x, *arguments, **keywords) - linear(x, *arguments, **keywords)
    mixture = layer.mixtures()["default"]
    alone = LMoELinear.from_config(nn.Linear(6, 5, bias=False, dtype=torch.float64), mixture.config)
    nn.init.zeros_(alone.frozen_layer.weight)
    alone.set_mixture("default", mixture)
    assert got.any()
    torch.testing.assert_close(got, alone(x))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_experts_are_wide_over_a_narrow_base(base: torch.dtype) -> None:
    wide = torch.float64 if base == torch.float64 else torch.float32
    model, layer = with_layer(nn.Linear(6, 5, dtype=base))
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {wide}
    y = model(torch.randn(4, 6, dtype=base))
    assert y.dtype == base
    y.sum().backward()
    assert layer.lmoe_gate["default"].grad.dtype == wide


def test_autocast_adapter_dtype_off_gives_the_dtype_of_the_base() -> None:
    model = get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    assert {p.dtype for p in trained(get_peft_model(llama().bfloat16(), config())).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_narrow_experts_over_a_wide_x_compute_in_fp32() -> None:
    model, layer = with_layer(nn.Linear(6, 5), torch.bfloat16)
    wide = copy.deepcopy(model)
    wide[0].cast("default", torch.float32)
    x = torch.randn(4, 6)
    assert torch.equal(model(x), wide(x))
    model(x).sum().backward()
    assert layer.lmoe_B["default"].grad.dtype == torch.bfloat16


def test_copies_leave_the_router_logits_behind() -> None:
    model, layer = with_layer(nn.Linear(6, 5), output_router_logits=True)
    x = torch.randn(4, 6)
    y = model(x)
    assert layer.kept_router_logits()["default"].requires_grad
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].kept_router_logits() == {}
        assert torch.equal(other(x), y)
    layer.enable_adapters(False)
    model(x)
    assert layer.kept_router_logits() == {}


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "the layer's"])
def test_merging_says_why_there_is_no_single_weight(method: str) -> None:
    model = tuned(modules_to_save=["embed_tokens"])
    before, expected = state(model), logits(model)
    merge = tuner_layers(model)[NAMES[0]].merge if method == "the layer's" else getattr(model, method)
    with pytest.raises(
        ValueError, match=r"^merge: the adapter must have one weight for all tokens, got .*unload\(\)[^\n]*$"
    ):
        merge()
    assert state(model) == before
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_a_mixture_can_be_replaced_and_its_configuration_follows() -> None:
    """A second model that was made from the same configuration keeps its own."""
    given = config(lora_alpha=6, rank_pattern={"down_proj": 4})
    model, other = get_peft_model(llama(), given), get_peft_model(llama(), given)
    names = ["a", "b", "c", "d"]
    for layer in tuner_layers(model).values():
        options = layer.mixtures()["default"].config
        options = options._replace(num_experts=4, expert_names=names, gate_bias=True)
        shapes = options.shapes(layer.in_features, layer.out_features)
        new = {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}
        layer.set_mixture("default", Mixture(options, new))
        assert all(torch.equal(tensor, new[key]) for key, tensor in layer.mixtures()["default"].tensors.items())
        assert all(tensor.requires_grad for tensor in layer.mixtures()["default"].tensors.values())
    changed = model.peft_config["default"]
    assert (changed.num_experts, changed.expert_names, changed.gate_bias) == (4, names, True)
    assert (changed.r, changed.rank_pattern, changed.alpha_pattern) == (2, {"down_proj": 4}, {})
    assert other.peft_config["default"].num_experts == 3
    for name, layer in tuner_layers(model).items():
        assert changed.layer_config(name) == layer.mixtures()["default"].config
    logits(model)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_mixture_of_another_rank_is_noted_in_the_patterns(use_rslora: bool) -> None:
    model = get_peft_model(llama(), config(use_rslora=use_rslora))
    layer = tuner_layers(model)[NAMES[2]]
    options = LayerConfig(num_experts=3, rank=5, alpha=7.0)
    shapes = options.shapes(layer.in_features, layer.out_features)
    layer.set_mixture("default", Mixture(options, {key: torch.zeros(shape) for key, shape in shapes.items()}))
    changed = model.peft_config["default"]
    assert changed.layer_config(NAMES[2]).rank == 5
    assert changed.layer_config(NAMES[2]).alpha == pytest.approx(7.0)
    for name in (NAMES[0], NAMES[1], NAMES[3]):
        assert changed.layer_config(name) == tuner_layers(model)[name].mixtures()["default"].config


def test_replaced_tensors_of_an_inactive_adapter_stay_frozen() -> None:
    model = tuned(adapter="a")
    model.add_adapter("b", config(top_k=2, choice_bias=True))
    layer = tuner_layers(model)[NAMES[0]]
    for adapter in ("a", "b"):
        mixture = layer.mixtures()[adapter]
        layer.set_mixture(adapter, mixture._replace(tensors={k: t.detach().clone() for k, t in mixture.tensors.items()}))
    assert all(t.requires_grad for t in layer.mixtures()["a"].tensors.values())
    assert not any(t.requires_grad for t in layer.mixtures()["b"].tensors.values())
    model.set_adapter("b")
    of_b = layer.mixtures()["b"].tensors
    assert [key for key, tensor in of_b.items() if not tensor.requires_grad] == ["choice_bias"]


def test_targets_of_all_kinds_of_names_are_the_same_layers() -> None:
    assert list(tuner_layers(tuned(target_modules=TARGETS))) == NAMES
    assert list(tuner_layers(tuned(target_modules=r".*(q_proj|down_proj)"))) == NAMES
