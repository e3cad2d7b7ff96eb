"""Directories of the PEFT tuner: round trips are bitwise, and a bad directory leaves the model as it was."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from lmoe_kernels.peft import LMoEConfig
from tests.integration.peft.tuned import config, fill, logits, state, trained, tuned, tuner_layers
from tests.models import IDS, llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).parents[3]
WEIGHTS = "adapter_model.safetensors"
OPTIONS = {
    "defaults": {},
    "every tensor": {"top_k": 2, "gate_bias": True, "choice_bias": True, "expert_names": ["a", "b", "c"]},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"1.mlp.down_proj": 3}, "use_rslora": True},
    "shared": {"shared_a": True, "mixing": "outputs"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_round_trip(name: str, low_cpu_mem_usage: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = llama().to(dtype)
    model = tuned(copy.deepcopy(plain), **OPTIONS[name])
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", WEIGHTS, "README.md"}
    loaded = PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    for layer_name, layer in tuner_layers(loaded).items():
        ours, theirs = layer.mixtures()["default"], tuner_layers(model)[layer_name].mixtures()["default"]
        assert ours.config == theirs.config
        assert {key: tensor.dtype for key, tensor in ours.tensors.items()} == {k: t.dtype for k, t in theirs.tensors.items()}
        assert all(torch.equal(tensor, theirs.tensors[key]) for key, tensor in ours.tensors.items())
    assert not trained(loaded)
    trainable = PeftModel.from_pretrained(loaded.unload(), tmp_path, is_trainable=True)
    assert trained(trainable).keys() == trained(model).keys()


def test_round_trip_in_a_second_process(tmp_path: Path) -> None:
    plain = llama()
    plain.save_pretrained(tmp_path / "base")
    model = tuned(copy.deepcopy(plain), top_k=2, gate_bias=True)
    model.save_pretrained(tmp_path / "adapter")
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    program = f"""
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import lmoe_kernels.peft
folder = Path({str(tmp_path)!r})
base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
model = PeftModel.from_pretrained(base, folder / "adapter")
with torch.no_grad():
    save_file({{"logits": model(load_file(folder / "ids.safetensors")["ids"]).logits}}, folder / "logits.safetensors")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(model))


def test_auto_classes_load_the_base_and_the_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft", minversion="0.20")  # transformers asks for it
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = tuned(base, top_k=2, gate_bias=True)
    model.save_pretrained(tmp_path / "adapter")
    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
        assert torch.equal(logits(loaded), logits(model))


def test_several_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    plain = llama()
    model = tuned(copy.deepcopy(plain), adapter="a")
    model.add_adapter("b", config(num_experts=2, r=5, target_modules=["v_proj", "down_proj"]))
    fill(model, "b")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "a" / WEIGHTS).is_file()
    expected = {}
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        expected[adapter] = logits(model)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "a", adapter_name="first")
    assert torch.equal(logits(loaded), expected["a"])
    loaded.load_adapter(tmp_path / "b", "second")
    assert torch.equal(logits(loaded), expected["a"])
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected["b"])
    loaded.set_adapter("first")
    assert torch.equal(logits(loaded), expected["a"])


def test_a_configuration_that_was_read_can_be_used_for_a_new_adapter(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    read = LMoEConfig.from_pretrained(str(tmp_path))
    other = llama()
    del other.model.layers[1]
    get_peft_model(other, replace(read, inference_mode=False))
    assert len(tuner_layers(other)) == 2


def edited(directory: Path, edit) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def configured(directory: Path, **options) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def key_of(tensors: dict[str, Tensor], end: str) -> str:
    return next(key for key in tensors if key.endswith(end))


def widened(tensors: dict[str, Tensor]) -> None:
    key = key_of(tensors, "lmoe_gate")
    tensors[key] = torch.randn(5, tensors[key].shape[1])


def without(tensors: dict[str, Tensor]) -> None:
    del tensors[key_of(tensors, "lmoe_A")]


def with_more(tensors: dict[str, Tensor]) -> None:
    tensors[key_of(tensors, "lmoe_A").replace("lmoe_A", "lmoe_later")] = torch.zeros(1)


def replaced(directory: Path) -> None:
    """Save a plain LoRA in the file of tensors, with the configuration of this tuner."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(directory / "lora")
    (directory / "lora" / WEIGHTS).rename(directory / WEIGHTS)


def cut(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


BAD = {
    "truncated": (cut, "adapter_model.safetensors must be a complete safetensors file, got "),
    "empty": (lambda d: (d / WEIGHTS).write_bytes(b""), "must be a complete safetensors file, got "),
    "no tensors": (lambda d: (d / WEIGHTS).unlink(), "must hold adapter_model.safetensors, got its configuration alone"),
    "wide gate": (lambda d: edited(d, widened), r"lmoe_gate' in .* must have shape \(3, \d+\), got \(5, \d+\)"),
    "missing tensor": (lambda d: edited(d, without), "must hold 'model.layers.*lmoe_A', got none of that name"),
    "unknown tensor": (lambda d: edited(d, with_more), "must hold only tensors that .*, got 'model.layers.*lmoe_later'"),
    "num_experts": (lambda d: configured(d, num_experts=4), r"must have shape \(4, 2, \d+\), got \(3, 2, \d+\)"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "Expecting property name"),  # PEFT's own error
    "bad option": (lambda d: configured(d, top_k=7), r"LMoEConfig: top_k must be in 1 .. E = 3, got 7"),
    "gate_bias": (lambda d: configured(d, gate_bias=True), "must hold '.*lmoe_gate_bias', got none of that name"),
    "of a LoRA": (replaced, "must hold '.*lmoe_A', got none of that name"),
    "targets": (lambda d: configured(d, target_modules=["q_proj"]), "must hold only tensors that .*down_proj"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_a_bad_directory_is_one_error_and_changes_nothing(name: str, how: str, tmp_path: Path) -> None:
    spoil, text = BAD[name]
    tuned().save_pretrained(tmp_path)
    spoil(tmp_path)
    model = tuned(adapter="a") if how == "load_adapter" else llama()
    refused(model, how, tmp_path, text)


def with_a_narrow_block() -> nn.Module:
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(*size).double() for size in ((16, 12), (16, 12), (12, 16)))
    return model


def with_one_block() -> nn.Module:
    model = llama()
    del model.model.layers[1]
    return model


OTHERS = {
    "other sizes": (
        with_a_narrow_block,
        r"'model.layers.1.mlp.down_proj.lmoe_A' in .* must have shape \(3, 2, 12\), got \(3, 2, 24\)",
    ),
    "compiled": (
        lambda: torch.compile(llama(), backend="eager"),
        "must hold '_orig_mod.model.layers.*', got none of that name",
    ),
    "fewer blocks": (with_one_block, "must hold only tensors that .*, got 'model.layers.1"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_another_base_is_one_error_and_changes_nothing(name: str, how: str, tmp_path: Path) -> None:
    other, text = OTHERS[name]
    tuned().save_pretrained(tmp_path)
    refused(tuned(other(), adapter="a") if how == "load_adapter" else other(), how, tmp_path, text)


def refused(model: nn.Module, how: str, directory: Path, text: str) -> None:
    before, expected = state(model), logits(model)
    with pytest.raises((ValueError, TypeError), match=text) as caught:
        model.load_adapter(directory, "b") if how == "load_adapter" else PeftModel.from_pretrained(model, directory)
    assert "\n" not in str(caught.value)
    assert state(model) == before
    assert torch.equal(logits(model), expected)
    if how == "load_adapter":
        assert list(model.peft_config) == ["a"]


def classifier(labels: int) -> nn.Module:
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(**size, num_labels=labels, pad_token_id=0)).double().eval()


HEADS = {
    "other labels": (2, lambda tensors: None, r"score.weight' in .* must have shape \(2, 16\), got \(3, 16\)"),
    "no head": (3, lambda tensors: tensors.pop("base_model.model.score.weight"), "must hold '.*score.weight', got none of"),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_another_head_is_one_error_and_changes_nothing(name: str, how: str, tmp_path: Path) -> None:
    labels, edit, text = HEADS[name]
    tuned(classifier(3), task_type="SEQ_CLS").save_pretrained(tmp_path)
    edited(tmp_path, edit)
    other = classifier(labels)
    refused(tuned(other, adapter="a", task_type="SEQ_CLS") if how == "load_adapter" else other, how, tmp_path, text)


def test_a_lora_is_not_loaded_into_this_tuner(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = tuned(adapter="a")
    refused(model, "load_adapter", tmp_path, "Cannot combine adapters with different peft types")


def test_a_state_dict_chooses_the_layers(tmp_path: Path) -> None:
    """PEFT's `inject_adapter_in_model` can take the layers from a state dict instead of from target_modules."""
    tuned(target_modules=["v_proj"]).save_pretrained(tmp_path)
    state_dict = {k.removeprefix("base_model.model."): t for k, t in load_file(tmp_path / WEIGHTS).items()}
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
        model = inject_adapter_in_model(config(), llama(), state_dict=state_dict)
    assert {name.rpartition(".")[2] for name in tuner_layers(model)} == {"v_proj"}
    model = llama()
    before = state(model)
    widened(state_dict)
    with (
        pytest.warns(RuntimeWarning, match="an inconsistency was discovered"),
        pytest.raises(
            ValueError, match=r"^LMoEModel: '.*lmoe_gate' in the state dict must have shape \(3, 16\), got \(5, 16\)$"
        ),
    ):
        inject_adapter_in_model(config(), model, state_dict=state_dict)
    assert state(model) == before


def test_a_state_dict_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    """A Trainer resumes in this way: the adapter exists, and its tensors are replaced."""
    pytest.importorskip("peft", minversion="0.21")  # older ones load what fits, and raise PyTorch's error
    tuned().save_pretrained(tmp_path)
    edited(tmp_path, widened)
    model = tuned()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"^load_adapter: '.*lmoe_gate' in the state dict must have shape .*, got \(5, \d+\)$"
    ):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
