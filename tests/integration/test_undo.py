"""The experts of a model can be disabled, removed, counted and unfrozen."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lmoe_kernels import (
    LMoELinear,
    apply_lmoe,
    disable_lmoe,
    lmoe_layers,
    print_trainable_parameters,
    remove_lmoe,
    save_lmoe,
    train_lmoe,
)
from tests.models import IDS, llama, with_experts


def test_remove_gives_the_frozen_model_back() -> None:
    plain = llama()
    modules, tensors = dict(plain.named_modules()), copy.deepcopy(plain.state_dict())
    model = with_experts(plain)
    assert remove_lmoe(model) == [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert "save_pretrained" not in vars(model)
    assert remove_lmoe(model) == []


def test_remove_undoes_several_calls_of_apply() -> None:
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=1)
    apply_lmoe(model, "k_proj", num_experts=2, rank=1)
    train_lmoe(model)
    remove_lmoe(model)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    assert not {"save_pretrained", "resize_token_embeddings"} & {name for m in model.modules() for name in vars(m)}


def test_remove_and_apply_again(tmp_path: Path) -> None:
    """Modules that were saved with the first experts are not saved with the next."""
    model = llama()
    apply_lmoe(model, "q_proj", modules_to_save="lm_head", num_experts=2, rank=1)
    remove_lmoe(model)
    apply_lmoe(model, "k_proj", num_experts=2, rank=1)
    assert not model.lm_head.weight.requires_grad
    save_lmoe(model, tmp_path)
    assert '"modules_to_save": []' in (tmp_path / "lmoe_config.json").read_text()


def test_remove_finds_every_name_of_a_shared_layer() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    apply_lmoe(model, "all-linear", num_experts=2, rank=1)
    assert remove_lmoe(model) == ["a", "b.0"]
    assert model["a"] is linear
    assert model["b"][0] is linear


def test_a_layer_that_is_the_whole_model_cannot_be_removed() -> None:
    with pytest.raises(
        ValueError, match=r"remove_lmoe: model must contain L-MoE layers, got an LMoELinear \(use its frozen_layer"
    ):
        remove_lmoe(LMoELinear(4, 4, num_experts=2, rank=1))


def test_a_disabled_model_computes_as_the_frozen_one() -> None:
    plain = llama()
    model = with_experts(copy.deepcopy(plain))
    trained = model(IDS).logits
    with disable_lmoe(model):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        with disable_lmoe(model):
            pass
        assert torch.equal(model(IDS).logits, plain(IDS).logits), "the inner block ended the outer one"
    assert torch.equal(model(IDS).logits, trained)
    with pytest.raises(KeyError), disable_lmoe(model):
        raise KeyError
    assert torch.equal(model(IDS).logits, trained)


def test_disabled_layers_keep_no_router_logits() -> None:
    model = with_experts(llama(), output_router_logits=True)
    model(IDS)
    with disable_lmoe(model):
        model(IDS)
    assert all(layer.router_logits is None for layer in lmoe_layers(model).values())


def test_trainable_parameters_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"a": nn.Linear(10, 10, bias=False)})
    apply_lmoe(model, "a", num_experts=2, rank=1)
    print_trainable_parameters(model)
    assert capsys.readouterr().out == "trainable params: 60 || all params: 160 || trainable%: 37.5000\n"
    print_trainable_parameters(nn.Identity())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


def test_train_unfreezes_experts_gates_and_modules_to_save_alone() -> None:
    model = llama()
    apply_lmoe(model, "q_proj", modules_to_save="lm_head", num_experts=2, rank=1)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    train_lmoe(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
