"""L-MoE and PEFT in one model: both are trained, saved and loaded, and neither breaks the other."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from lmoe_kernels import apply_lmoe, disable_lmoe, lmoe_layers, load_lmoe, remove_lmoe, save_lmoe, train_lmoe
from tests.models import IDS, llama, with_experts

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = [f"model.layers.{i}.{layer}" for i in (0, 1) for layer in ("self_attn.q_proj", "mlp.down_proj")]


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


def lora_first(model: nn.Module) -> PeftModel:
    """PEFT's adapter on layers that get experts below it, and on others."""
    return with_experts(get_peft_model(model, lora("q_proj", "v_proj")))


def lora_last(model: nn.Module) -> PeftModel:
    """PEFT's adapter on other layers and on frozen layers inside of L-MoE layers, which PEFT's "all-linear" finds too."""
    model = get_peft_model(with_experts(model), lora("v_proj", "q_proj.frozen_layer"))
    train_lmoe(model)
    return model


BOTH: dict[str, Callable[[nn.Module], PeftModel]] = {"LoRA, then L-MoE": lora_first, "L-MoE, then LoRA": lora_last}
both = pytest.mark.parametrize("order", BOTH)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def kinds(model: nn.Module) -> set[str]:
    """The names of the trained parameters, without the names of their layers."""
    ends = ("lora_A.default.weight", "lora_B.default.weight", "lora_a", "lora_b", "gate_weight")
    return {next((end for end in ends if name.endswith(f".{end}")), name) for name in trained(model)}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@both
def test_both_are_trained(order: str) -> None:
    model = BOTH[order](llama()).train()
    assert kinds(model) == {"lora_A.default.weight", "lora_B.default.weight", "lora_a", "lora_b", "gate_weight"}
    before, frozen = trained(model), copy.deepcopy([p for p in model.parameters() if not p.requires_grad])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, adamw(model), 1)
    after = trained(model)
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    now = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(now, frozen, strict=True))


@both
def test_each_is_saved_in_its_own_file(order: str, tmp_path: Path) -> None:
    model = BOTH[order](llama())
    save_lmoe(model, tmp_path / "lmoe")
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = load_file(tmp_path / "lmoe/lmoe.safetensors"), load_file(tmp_path / "peft/adapter_model.safetensors")
    tensors = {
        f"{name}.{key}": layer.get_parameter(key) for name, layer in lmoe_layers(model).items() for key in layer.shapes()
    }
    assert list(lmoe_layers(model)) == NAMES
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in ours.items())
    assert len(theirs) == 8
    assert all(".lora_A." in name or ".lora_B." in name for name in theirs)


@both
def test_a_plain_model_takes_the_experts(order: str, tmp_path: Path) -> None:
    model = BOTH[order](llama())
    save_lmoe(model, tmp_path)
    plain = llama()
    assert load_lmoe(plain, tmp_path) == NAMES
    assert all(torch.equal(layer.lora_b, lmoe_layers(model)[name].lora_b) for name, layer in lmoe_layers(plain).items())


@both
def test_both_resume(order: str, tmp_path: Path) -> None:
    """Training resumes bitwise if both are loaded in the order in which they were added."""
    base = llama()
    model = BOTH[order](copy.deepcopy(base)).train()
    optimizer = adamw(model)
    steps(model, optimizer, 2)
    model.save_pretrained(tmp_path)
    save_lmoe(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, 2)

    if order == "LoRA, then L-MoE":
        resumed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
        load_lmoe(resumed, tmp_path)
    else:
        resumed = copy.deepcopy(base)
        load_lmoe(resumed, tmp_path)
        resumed = PeftModel.from_pretrained(resumed, tmp_path, is_trainable=True)
        train_lmoe(resumed)
    assert list(trained(resumed)) == list(trained(model))
    optimizer = adamw(resumed.train())
    optimizer.load_state_dict(state)
    steps(resumed, optimizer, 2)
    expected = trained(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(resumed).items())


@both
@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
def test_removing_the_adapter_of_peft_keeps_the_experts(order: str, method: str) -> None:
    model = BOTH[order](llama())
    layers = lmoe_layers(model)
    factors = {name: layer.lora_b.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        if method == "unload":
            with model.disable_adapter():
                expected = model(IDS).logits
        else:
            expected = model(IDS).logits
        plain = getattr(model, method)()
        torch.testing.assert_close(plain(IDS).logits, expected)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert lmoe_layers(plain) == layers
    assert all(torch.equal(layer.lora_b, factors[name]) for name, layer in lmoe_layers(plain).items())
    assert all(type(layer.frozen_layer) is nn.Linear for layer in layers.values())


@both
def test_each_is_switched_off_by_its_own_context(order: str) -> None:
    base = llama()
    model = BOTH[order](copy.deepcopy(base))
    trainable = list(trained(model))
    with torch.no_grad():
        outputs = [model(IDS).logits]
        with model.disable_adapter():
            outputs.append(model(IDS).logits)
            with disable_lmoe(model):
                torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
        with disable_lmoe(model):
            outputs.append(model(IDS).logits)
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    assert list(trained(model)) == trainable


@both
def test_experts_can_be_removed_from_a_peft_model(order: str) -> None:
    model = BOTH[order](llama())
    with disable_lmoe(model), torch.no_grad():
        expected = model(IDS).logits
    assert remove_lmoe(model) == NAMES
    assert torch.equal(model(IDS).logits, expected)
    assert kinds(model) == {"lora_A.default.weight", "lora_B.default.weight"}


LATER: dict[str, PeftConfig] = {
    "LoRA": lora("v_proj"),
    "IA3": IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("method", LATER)
def test_experts_that_peft_froze_give_a_warning(method: str) -> None:
    """PEFT freezes all parameters that it finds: without a warning, the user would not notice that no expert is trained."""
    model = get_peft_model(with_experts(llama()), LATER[method]).train()
    assert not {"lora_a", "lora_b", "gate_weight"} & kinds(model)
    text = r"lora_a, lora_b and gate_weight are frozen.*train_lmoe\(model\)"
    with pytest.warns(UserWarning, match=text):
        model(input_ids=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(input_ids=IDS)
        model.eval()(input_ids=IDS)
        train_lmoe(model.train())
        model(input_ids=IDS)
    assert {"lora_a", "lora_b", "gate_weight"} < kinds(model)


def test_gates_alone_may_be_trained() -> None:
    """A partly frozen layer gives no warning: the user may train the gates of experts that were trained separately."""
    model = with_experts(llama()).train()
    for layer in lmoe_layers(model).values():
        layer.lora_a.requires_grad_(False)
        layer.lora_b.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS)


@pytest.mark.parametrize("method", LATER)
def test_what_peft_trains_stays_trained(method: str) -> None:
    model = get_peft_model(llama(), LATER[method])
    before = set(trained(model))
    assert before
    assert apply_lmoe(model, ["q_proj", "down_proj"], num_experts=3, rank=2) == NAMES
    assert before < set(trained(model))
    assert kinds(model) >= {"lora_a", "lora_b", "gate_weight"}


def test_a_second_adapter_of_peft_freezes_nothing() -> None:
    model = lora_first(llama())
    model.add_adapter("second", lora("k_proj"))
    assert kinds(model) >= {"lora_a", "lora_b", "gate_weight"}


def test_peft_refuses_layers_with_experts() -> None:
    """PEFT adapts nn.Linear and its own layers alone: call get_peft_model first, or name the frozen layer as the target."""
    with pytest.raises(ValueError, match=r"(?s)LMoELinear.*is not supported"):
        get_peft_model(with_experts(llama()), lora("q_proj"))
