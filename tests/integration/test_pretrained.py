"""save_pretrained and from_pretrained of transformers restore models with L-MoE layers: nothing is initialised again."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lmoe_kernels import apply_lmoe, lmoe_layers, load_lmoe, remove_lmoe
from tests.models import IDS, llama, state


def _model(targets, tied: bool = False, **options) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), "tie_word_embeddings": tied})).eval()
    apply_lmoe(model, targets, num_experts=3, rank=2, **options)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def _restored(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    load_lmoe(model, folder)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["two embeddings", "tied embeddings"])
@pytest.mark.parametrize("targets", ["q_proj", ["q_proj", "lm_head"], "all-linear"], ids=str)
def test_what_was_saved_is_restored_bitwise(targets, tied: bool, tmp_path: Path) -> None:
    model = _model(targets, tied)
    model.save_pretrained(tmp_path)
    again = _restored(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert state(again) == state(model)
    if tied and targets != "q_proj" and targets != "all-linear":
        assert again.lm_head.frozen_layer.weight is again.model.embed_tokens.weight


def _names_saved(model: LlamaForCausalLM, folder: Path) -> set[str]:
    model.save_pretrained(folder)
    return set(load_file(folder / "model.safetensors"))


def test_the_base_has_its_own_names(tmp_path: Path) -> None:
    """Programs without L-MoE load it as the plain model."""
    plain = llama()
    model = copy.deepcopy(plain)
    apply_lmoe(model, "q_proj", num_experts=2, rank=1)
    saved = _names_saved(model, tmp_path)
    added = {key for key in saved if key.rpartition(".")[2] in ("lora_a", "lora_b", "gate_weight")}
    assert set(saved) - added == _names_saved(plain, tmp_path / "plain")
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, plain(IDS).logits)


def test_modules_to_save_and_shards(tmp_path: Path) -> None:
    model = _model("q_proj", modules_to_save="lm_head")
    nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = _restored(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.weight.requires_grad


def test_a_given_state_dict_is_written(tmp_path: Path) -> None:
    """The processes of a sharded training gather one; its tensors are written instead of the model's."""
    model = _model("q_proj")
    tensors = {f"_orig_mod.{key}": tensor + 1 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=tensors)
    again = _restored(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor + 1), name
    tensors.popitem()
    with pytest.raises(ValueError, match=r"save_pretrained: state_dict must hold '.*', got none of that name"):
        model.save_pretrained(tmp_path / "other", state_dict={key: t for key, t in tensors.items() if "lora_a" not in key})


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    _model("q_proj").save_pretrained(tmp_path, False)
    assert not list(tmp_path.glob("lmoe*"))


def test_a_copy_saves_its_own_tensors(tmp_path: Path) -> None:
    model = _model("q_proj")
    copied = copy.deepcopy(model)
    nn.init.normal_(lmoe_layers(copied)["model.layers.0.self_attn.q_proj"].lora_b)
    copied.save_pretrained(tmp_path)
    assert torch.equal(_restored(tmp_path)(IDS).logits, copied(IDS).logits)


def test_an_inner_model_saves_its_own_tensors(tmp_path: Path) -> None:
    model = _model("q_proj")
    model.model.save_pretrained(tmp_path)
    again = LlamaModel.from_pretrained(tmp_path).eval()
    load_lmoe(again, tmp_path)
    assert torch.equal(again(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_part_without_experts_saves_no_adapter(tmp_path: Path) -> None:
    model = _model("lm_head")
    model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("lmoe*"))


def test_a_state_dict_of_the_plain_model_can_be_loaded() -> None:
    """Trainer loads one when it resumes from files that save_pretrained wrote."""
    model = _model("q_proj")
    plain = {key.replace(".frozen_layer", ""): tensor + 1 for key, tensor in model.state_dict().items()}
    kept = dict(plain)
    assert model.load_state_dict(plain) == nn.modules.module._IncompatibleKeys([], [])
    assert plain == kept, "the caller's dict was changed"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name.replace(".frozen_layer", "")])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_proj.frozen_layer.alien"):
        model.load_state_dict({**kept, "model.layers.0.self_attn.q_proj.alien": torch.ones(1)})


@pytest.mark.parametrize("tied", [False, True], ids=["two embeddings", "tied embeddings"])
def test_an_output_embedding_with_experts_is_not_resized(tied: bool) -> None:
    model = _model(["q_proj", "lm_head"], tied)
    before, sizes = state(model), [p.shape for p in model.parameters()]
    with pytest.raises(ValueError) as caught:
        model.resize_token_embeddings(40)
    must = "be resized before its output embedding gets experts (call remove_lmoe, resize, apply_lmoe)"
    assert str(caught.value) == f"resize_token_embeddings: model must {must}, got one whose output embedding has experts"
    assert state(model) == before
    assert [p.shape for p in model.parameters()] == sizes
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    remove_lmoe(model)
    model.resize_token_embeddings(40)
    assert model(IDS).logits.shape[-1] == 40


def test_embeddings_without_experts_can_be_resized(tmp_path: Path) -> None:
    model = _model("q_proj")
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path)
    assert torch.equal(_restored(tmp_path)(IDS).logits, model(IDS).logits)
