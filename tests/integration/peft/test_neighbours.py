"""The package's functions on models next to the PEFT tuner: names, warmup, `apply_lmoe`, `save_lmoe` and others."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lmoe_kernels import (
    apply_lmoe,
    disable_lmoe,
    lmoe_layers,
    load_lmoe,
    print_trainable_parameters,
    remove_lmoe,
    save_lmoe,
    train_lmoe,
    warmup,
)
from lmoe_kernels.compilation import _kinds, _sources
from lmoe_kernels.contents import digest_of_base
from lmoe_kernels.mixture import LayerWithExperts
from lmoe_kernels.targets import layers_with_experts, wrappable_layers
from tests.integration.peft.tuned import NAMES, config, fill, logits, state, steps, trained, tuned, tuner_layers
from tests.models import IDS, llama, with_experts

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_layers_have_the_names_of_the_plain_model() -> None:
    plain = llama()
    digest, linears = digest_of_base(plain), list(wrappable_layers(plain))
    model = tuned(copy.deepcopy(plain), adapter="a", modules_to_save=["lm_head"])
    compiled = torch.compile(model)
    for one in (model, compiled, model.get_base_model()):
        assert list(layers_with_experts(one)) == NAMES
        assert lmoe_layers(one) == {}
        assert digest_of_base(one) == digest
        left = [name for name in linears if name not in NAMES and name != "lm_head"]
        assert [name for name in wrappable_layers(one) if "lm_head" not in name] == left


def test_parameters_are_counted_like_peft_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = tuned()
    print_trainable_parameters(model)
    ours = capsys.readouterr().out
    model.print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_layers_of_the_tuner_get_no_second_experts() -> None:
    model = tuned()
    before = state(model)
    with pytest.raises(
        ValueError, match=r"^apply_lmoe: target_modules must match .* of the model, got 'down_proj'; .* already has"
    ):
        apply_lmoe(model, "down_proj")
    assert state(model) == before


def test_both_kinds_share_a_model(tmp_path: Path) -> None:
    """On different layers, each is trained, saved and loaded in its own way."""
    plain = llama()
    model = tuned(copy.deepcopy(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the tuner's dictionaries must not be taken for stacked experts of the model
        names = apply_lmoe(model, "all-linear", num_experts=2, rank=2)
    assert len(names) == 10
    assert not set(names) & set(NAMES)
    assert set(layers_with_experts(model)) == {*names, *NAMES}
    before = trained(model)
    steps(model, 2)
    after = trained(model)
    assert after.keys() == before.keys()
    assert {name.split(".")[-1] for name in before} == {"default", "lora_a", "lora_b", "gate_weight"}
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert load_lmoe(loaded, tmp_path) == names
    assert torch.equal(logits(loaded), expected)
    with disable_lmoe(model), model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    assert remove_lmoe(model) == names
    assert list(layers_with_experts(model)) == NAMES


def test_the_tuner_refuses_layers_with_experts() -> None:
    model = with_experts(llama())
    before = state(model)
    for target in ("q_proj", "q_proj.frozen_layer"):
        with pytest.raises(
            ValueError, match=r"^LMoEModel: target_modules must name layers without experts, got '.*' with those of"
        ):
            get_peft_model(model, config(target_modules=[target]))
    assert state(model) == before
    get_peft_model(model, config(target_modules=["v_proj"]))
    train_lmoe(model)
    assert len(lmoe_layers(model)) == 4
    assert len(layers_with_experts(model)) == 6


def test_save_lmoe_says_what_saves_the_adapter(tmp_path: Path) -> None:
    text = r"^save_lmoe: model must have L-MoE layers \(see apply_lmoe\), got only those of a PEFT adapter \(its save_"
    with pytest.raises(ValueError, match=text):
        save_lmoe(tuned(), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"got none$"):
        save_lmoe(llama(), tmp_path)


def test_a_model_without_experts_of_ours_loads_none_into_the_tuner(tmp_path: Path) -> None:
    save_lmoe(with_experts(llama()), tmp_path)
    model = tuned()
    before = state(model)
    with pytest.raises(ValueError, match=r"^load_lmoe: layer '.*' must be a linear layer of the model"):
        load_lmoe(model, tmp_path)
    assert state(model) == before


def test_train_disable_and_remove_leave_the_tuner_alone() -> None:
    model = tuned()
    model.requires_grad_(False)
    expected = logits(model)
    train_lmoe(model)
    assert not trained(model)
    with disable_lmoe(model):
        assert torch.equal(logits(model), expected)
    assert remove_lmoe(model) == []
    assert torch.equal(logits(model), expected)


def test_warmup_looks_at_the_calls_of_all_adapters() -> None:
    """On a CPU no kernel is compiled; the calls are those of equal `LMoELinear` layers, and of further active adapters."""

    def kinds_of(layer: LayerWithExperts) -> list:
        return [kind for source in _sources(NAMES[0], layer) for kind in _kinds(source, None, True)]

    model = tuned(llama().float(), adapter="a", top_k=2)
    model.add_adapter("b", config(num_experts=2, target_modules=["q_proj"]))
    assert warmup(model, tokens=[1, 64]) == 0
    with pytest.raises(ValueError, match=r"^warmup: model must have L-MoE layers, got none$"):
        warmup(llama(), tokens=1)
    layer = tuner_layers(model)[NAMES[0]]
    ours = kinds_of(layer)
    linear = nn.Sequential(copy.deepcopy(layer.base_layer))
    apply_lmoe(linear, "0", num_experts=3, rank=2, top_k=2)
    (theirs,) = kinds_of(linear[0])
    assert len(ours) == 2
    assert ours[0] == theirs
    model.base_model.set_adapter(["a", "b"])
    third = kinds_of(layer)[2]
    assert (third.call[0].E, third.call[3]) == (2, 2)


def test_a_lora_of_peft_can_be_below() -> None:
    """The tuner's layer wraps one of another tuner like any linear layer."""
    inner = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).get_base_model()
    expected = logits(inner)
    del inner.peft_config
    model = get_peft_model(inner, config(target_modules=["q_proj"]))
    assert torch.equal(logits(model), expected)
    fill(model)
    assert not torch.equal(logits(model), expected)
    assert model(IDS).logits.shape == expected.shape
