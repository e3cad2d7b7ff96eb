"""What "all-linear" leaves out, which other parameters stay trained, and the errors and warnings about targets."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lmoe_kernels import LMoELinear, apply_lmoe, lmoe_layers, load_lmoe, save_lmoe
from tests.models import IDS, llama, state

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(vocab_size=32, **SMALL)).eval()


def classifier(kind: str) -> tuple[nn.Module, str]:
    """A model for classification, and the name of its head."""
    if kind == "BERT":
        return bert(), "classifier"
    if kind == "ViT":
        return ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, **SMALL)), "classifier"
    return LlamaForSequenceClassification(llama().config), "score"


@pytest.mark.parametrize("kind", ["BERT", "ViT", "Llama"])
def test_all_linear_skips_a_classifier(kind: str) -> None:
    model, head = classifier(kind)
    with pytest.warns(UserWarning, match=f"the head '{head}' is frozen; if it is newly initialised, pass modules_to_save"):
        names = apply_lmoe(model, "all-linear", num_experts=2, rank=2)
    assert names
    assert not isinstance(model.get_submodule(head), LMoELinear)
    assert not any(p.requires_grad for p in model.get_submodule(head).parameters())


@pytest.mark.parametrize("kind", ["BERT", "ViT", "Llama"])
def test_modules_to_save_are_trained_saved_and_loaded(kind: str, tmp_path) -> None:
    model, head = classifier(kind)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = apply_lmoe(model, "all-linear", modules_to_save=head, num_experts=2, rank=2)
    module = model.get_submodule(head)
    assert all(p.requires_grad for p in module.parameters())
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    save_lmoe(model, tmp_path)
    assert load_lmoe(plain, tmp_path) == names
    assert state(plain) == state(model)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    copied = copy.deepcopy(plain)  # a copy saves modules_to_save too
    save_lmoe(copied, tmp_path / "again")
    assert (tmp_path / "again" / "lmoe_config.json").read_text() == (tmp_path / "lmoe_config.json").read_text()


def test_buffers_of_modules_to_save_are_saved(tmp_path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    plain = copy.deepcopy(model)
    apply_lmoe(model, "body", modules_to_save=["norm"], num_experts=2, rank=1)
    model["norm"](torch.randn(8, 4))
    save_lmoe(model, tmp_path)
    load_lmoe(plain, tmp_path)
    assert torch.equal(plain["norm"].running_mean, model["norm"].running_mean)
    assert plain["norm"].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        ("classfier", "modules_to_save must match modules of the model, got 'classfier'; nearest: 'classifier'"),
        (["classifier", 1], "modules_to_save must be a str or several, got ['classifier', 1]"),
        ("bert", "modules_to_save must name modules without L-MoE layers, got 'bert'"),
    ],
)
def test_bad_modules_to_save_leave_the_model_unchanged(saved, text: str) -> None:
    model = bert()
    apply_lmoe(model, "query", modules_to_save="classifier", num_experts=2, rank=1)
    before = state(model)
    with pytest.raises((ValueError, TypeError)) as caught:
        apply_lmoe(model, "key", modules_to_save=saved, num_experts=2, rank=1)
    assert str(caught.value).startswith(f"apply_lmoe: {text}")
    assert state(model) == before


def test_a_module_to_save_of_another_shape_is_refused(tmp_path) -> None:
    model, other = bert(), bert()
    apply_lmoe(model, "query", modules_to_save="classifier", num_experts=2, rank=1)
    save_lmoe(model, tmp_path)
    other.classifier = nn.Linear(16, 5)
    before = state(other)
    with pytest.raises(ValueError, match=r"tensor 'classifier.weight' must have shape \(5, 16\), got \(2, 16\)"):
        load_lmoe(other, tmp_path)
    assert state(other) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda tensors: tensors.pop("classifier.bias"),
            "lmoe.safetensors must hold 'classifier.bias', got none of that name",
        ),
        (
            lambda tensors: tensors.update({"classifier.more": torch.ones(1)}),
            "hold only tensors of its layers and modules_to_save, got 1 unknown",
        ),
    ],
    ids=["missing", "foreign"],
)
def test_tensors_of_modules_to_save_are_complete(change, text: str, tmp_path) -> None:
    model = bert()
    plain = copy.deepcopy(model)
    apply_lmoe(model, "query", modules_to_save="classifier", num_experts=2, rank=1)
    save_lmoe(model, tmp_path)
    config, tensors = (tmp_path / "lmoe_config.json").read_text(), load_file(tmp_path / "lmoe.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "lmoe.safetensors", metadata={"lmoe_config": config})
    before = state(plain)
    with pytest.raises(ValueError) as caught:
        load_lmoe(plain, tmp_path)
    assert text in str(caught.value)
    assert state(plain) == before


def test_a_second_call_changes_nothing_that_the_user_set() -> None:
    """It neither freezes what the user unfroze nor unfreezes what the user froze."""
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=2)
    model.lm_head.requires_grad_(True)
    first = lmoe_layers(model)["model.layers.0.self_attn.q_proj"]
    first.requires_grad_(False)
    apply_lmoe(model, "k_proj", num_experts=2, rank=2)
    assert model.lm_head.weight.requires_grad
    assert not any(p.requires_grad for p in first.parameters())
    assert lmoe_layers(model)["model.layers.0.self_attn.k_proj"].num_trainable_parameters


def test_parts_of_layers_of_peft_are_not_targets() -> None:
    """A layer of PEFT holds the frozen layer and two small linear ones; none of these parts gets experts."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    lora = {name for name, p in model.named_parameters() if p.requires_grad}
    names = apply_lmoe(model, "all-linear", num_experts=2, rank=2)
    assert len(names) == 14
    assert not any("lora_" in name or "base_layer" in name for name in names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert lora < trained
    assert len(trained - lora) == 14 * 3
    model(IDS).logits.sum().backward()


def test_an_error_in_one_of_many_layers_changes_none() -> None:
    """The last layer fails after the others were made."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    model["last"].in_features = -1  # no shape that a parameter could have
    before = state(model)
    with pytest.raises(RuntimeError):
        apply_lmoe(model, "all-linear", num_experts=2, rank=1)
    assert state(model) == before


def _mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=3, **SMALL))


def test_a_warning_names_stacked_experts_that_are_skipped() -> None:
    with pytest.warns(
        UserWarning, match=r"'model.layers.0.mlp.experts.gate_up_proj', .* hold the weights of several"
    ) as seen:
        apply_lmoe(_mixtral(), "all-linear", num_experts=2, rank=1)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lmoe(_mixtral(), "q_proj", num_experts=2, rank=1)
    with pytest.raises(ValueError, match=r"got 'gate_up_proj'; 'model.*gate_up_proj' is one parameter with the weights of"):
        apply_lmoe(_mixtral(), "gate_up_proj")


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    model = bert()
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the head 'classifier' is frozen"):
            apply_lmoe(model, "all-linear", num_experts=2, rank=1)
    assert state(model) == before
