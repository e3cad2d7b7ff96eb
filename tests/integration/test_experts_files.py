"""Named experts in files: exported as LoRAs of PEFT, and in checkpoints."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmoe_kernels import (
    add_expert,
    apply_lmoe,
    expert_names,
    export_expert,
    lmoe_layers,
    load_lmoe,
    remove_expert,
    save_lmoe,
)
from tests.integration.test_experts import NAMES, Q, choose_last, error_of, mixture
from tests.models import IDS, llama, with_experts


def test_an_exported_expert_is_that_of_a_one_hot_gate(tmp_path: Path) -> None:
    """Of experts that were trained here, with a scaling of their own, in both mixings."""
    plain = llama()
    for mixing in ("outputs", "factors"):
        model = copy.deepcopy(plain)
        with_experts(model, mixing=mixing, alpha=0.7, gate_bias=True, expert_names=NAMES)
        choose_last(model)
        export_expert(model, "c", tmp_path / mixing)
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / mixing).eval()
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-10, atol=1e-10)


def test_an_untrained_expert_and_one_of_zeros_can_be_exported(tmp_path: Path) -> None:
    plain = llama()
    model = copy.deepcopy(plain)
    apply_lmoe(model, ["q_proj"], num_experts=2, rank=3)
    export_expert(model, "1", tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(IDS).logits, plain(IDS).logits)
    for layer in lmoe_layers(model).values():
        layer.lora_a.data.zero_()
    export_expert(model, "0", tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(IDS).logits, plain(IDS).logits)


def test_a_shared_a_is_exported_with_each_expert(tmp_path: Path) -> None:
    plain = llama()
    model = copy.deepcopy(plain)
    with_experts(model, shared_a=True, gate_bias=True)
    choose_last(model)
    export_expert(model, "2", tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-10, atol=1e-10)


def test_a_sharded_model_is_not_exported(tmp_path: Path) -> None:
    model = mixture()
    lmoe_layers(model)[Q].lora_a.full_tensor = lambda: None  # as the parameters of fully_shard have
    with pytest.raises(ValueError, match="export_expert: model must not be sharded, got one that is: load its checkpoint"):
        export_expert(model, "c", tmp_path)


def test_names_travel_with_a_checkpoint(tmp_path: Path) -> None:
    model = mixture()
    add_expert(model, "new")
    remove_expert(model, "english")
    save_lmoe(model, tmp_path)
    plain = llama()
    plain.load_state_dict(
        {k.replace("frozen_layer.", ""): v for k, v in model.state_dict().items() if "lora_" not in k}, False
    )
    load_lmoe(plain, tmp_path)
    assert expert_names(plain) == ["python", "c", "new"]
    assert torch.equal(plain(IDS).logits, model(IDS).logits)


def test_a_checkpoint_of_an_expert_that_was_removed(tmp_path: Path) -> None:
    model = mixture(gate_bias=True)
    save_lmoe(model, tmp_path)
    remove_expert(model, "python")
    got = "'english', 'python', 'c'"
    assert error_of(model, lambda: load_lmoe(model, tmp_path)) == (
        f"load_lmoe: layer '{Q}' must have the model's experts 'english', 'c', got {got} (see add_expert, remove_expert)"
    )


@pytest.mark.parametrize("names", [5, "abc", ["a", "b"], ["a", "b", 3], ["a", "b", "a"], {"a": 1}], ids=repr)
def test_damaged_names_in_a_checkpoint(names: object, tmp_path: Path) -> None:
    save_lmoe(mixture(), tmp_path)
    config = json.loads((tmp_path / "lmoe_config.json").read_text())
    for options in config["layers"].values():
        options["expert_names"] = names
    (tmp_path / "lmoe_config.json").unlink()
    tensors = load_file(tmp_path / "lmoe.safetensors")
    save_file(tensors, tmp_path / "lmoe.safetensors", {"format": "pt", "lmoe_config": json.dumps(config)})
    for model in (llama(), mixture()):
        message = error_of(model, lambda model=model: load_lmoe(model, tmp_path))
        assert message.startswith(f"load_lmoe: layer '{Q}'")


def test_a_gate_that_is_wider_than_the_experts(tmp_path: Path) -> None:
    save_lmoe(mixture(), tmp_path)
    file = tmp_path / "lmoe.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.gate_weight"] = torch.zeros(4, 16, dtype=torch.float64)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    model = llama()
    assert error_of(model, lambda: load_lmoe(model, tmp_path)) == (
        f"load_lmoe: tensor '{Q}.gate_weight' must have shape (3, 16), got (4, 16)"
    )
