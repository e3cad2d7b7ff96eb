"""Named experts in models of PEFT's `get_peft_model` with an `LMoEConfig`: PEFT's files and configuration follow."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lmoe_kernels import add_expert, expert_names, export_expert, remove_expert
from lmoe_kernels.peft import LMoEConfig
from lmoe_kernels.targets import layers_with_experts
from tests.integration.test_lora_adapter import lora
from tests.models import IDS, llama

TARGETS = ["q_proj", "v_proj"]


def tuned(plain: nn.Module, **options) -> PeftModel:
    config = LMoEConfig(num_experts=2, r=4, target_modules=TARGETS, mixing="outputs", expert_names=["a", "b"], **options)
    return get_peft_model(copy.deepcopy(plain), config).eval()


def choose(model: nn.Module, name: str) -> None:
    """Set the gate of one expert to 1, and the weights of the others' B to random numbers."""
    for layer in layers_with_experts(model).values():
        config, tensors = layer.mixtures()["default"]
        tensors["gate_weight"].data.zero_()
        tensors["gate_bias"].data.copy_(torch.tensor([0.0 if other == name else -torch.inf for other in config.names()]))


def loaded(plain: nn.Module, directory: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(plain), directory).eval()


def logits_of_lora(plain: nn.Module, directory: Path) -> Tensor:
    wrapped = lora(copy.deepcopy(plain), r=2, lora_alpha=5, use_rslora=True, target_modules=["q_proj"])
    wrapped.save_pretrained(directory)
    return wrapped(IDS).logits


def test_a_lora_becomes_an_expert_and_is_exported_again(tmp_path: Path) -> None:
    plain = llama()
    expected = logits_of_lora(plain, tmp_path / "lora")
    model = tuned(plain)
    add_expert(model, "lora", lora=tmp_path / "lora")
    choose(model, "lora")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-10, atol=1e-10)
    export_expert(model, "lora", tmp_path / "again")
    torch.testing.assert_close(loaded(plain, tmp_path / "again")(IDS).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 6}}, {"shared_a": True}], ids=str)
def test_the_configuration_follows_and_peft_loads_the_adapter(options: dict, tmp_path: Path) -> None:
    plain = llama()
    model = tuned(plain, **options)
    for layer in layers_with_experts(model).values():
        nn.init.normal_(layer.mixtures()["default"].tensors["lora_b"])
    add_expert(model, "c")
    remove_expert(model, "a")
    config = model.peft_config["default"]
    assert (config.num_experts, config.expert_names, config.gate_bias) == (2, ["b", "c"], True)
    model.save_pretrained(tmp_path)
    again = loaded(plain, tmp_path)
    assert expert_names(again) == ["b", "c"]
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_new_expert_hardly_changes_the_outputs_and_is_trained() -> None:
    model = tuned(llama())
    for layer in layers_with_experts(model).values():
        nn.init.normal_(layer.mixtures()["default"].tensors["lora_b"], std=0.1)
    before = model(IDS).logits
    add_expert(model, "c")
    assert 0 < (model(IDS).logits - before).norm() < 0.05 * before.norm()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for layer in layers_with_experts(model).values():
        tensors = layer.mixtures()["default"].tensors
        assert all(tensors[key].grad[2:].any() for key in ("lora_b", "gate_weight", "gate_bias"))


def test_the_active_adapter_is_meant() -> None:
    model = tuned(llama())
    model.add_adapter("second", LMoEConfig(num_experts=3, r=2, target_modules=["q_proj"], top_k=2, choice_bias=True))
    add_expert(model, "new")
    assert (expert_names(model), expert_names(model, adapter="second")) == (["a", "b", "new"], ["0", "1", "2"])
    model.set_adapter("second")
    add_expert(model, "other")
    assert expert_names(model) == ["0", "1", "2", "other"]
    assert model.peft_config["default"].num_experts == 3
    model(IDS)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("default" in name or "choice_bias" in name for name in trained)


def test_a_checkpoint_of_a_removed_expert_is_refused(tmp_path: Path) -> None:
    model = tuned(llama())
    model.save_pretrained(tmp_path)
    remove_expert(model, "a")
    with pytest.raises(ValueError) as caught:
        model.load_adapter(tmp_path, "default")
    assert "\n" not in str(caught.value)
