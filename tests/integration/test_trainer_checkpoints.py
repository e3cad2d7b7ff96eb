"""Checkpoints of transformers' Trainer: a resumed run ends bitwise as a run that was not stopped."""

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import LlamaForCausalLM, Trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lmoe_kernels import apply_lmoe, load_lmoe, remove_lmoe, train_lmoe
from tests.integration.test_trainer import arguments, rows
from tests.models import IDS, llama, with_experts

LORA = {"r": 2, "target_modules": ["v_proj"]}


def plain(base: nn.Module) -> nn.Module:
    return with_experts(base)


def with_a_head(base: nn.Module) -> nn.Module:
    apply_lmoe(base, "q_proj", num_experts=3, rank=2, modules_to_save="lm_head")
    return base


def with_compiled_blocks(base: nn.Module) -> nn.Module:
    model = with_experts(base)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def with_checkpointed_blocks(base: nn.Module) -> nn.Module:
    model = with_experts(base)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def with_blocks_compiled_and_checkpointed(base: nn.Module) -> nn.Module:
    """One block for each order of the two wrappers."""
    model = with_experts(base)
    first, second = model.model.layers
    model.model.layers[0] = checkpoint_wrapper(torch.compile(first, backend="eager"))
    model.model.layers[1] = torch.compile(checkpoint_wrapper(second), backend="eager")
    return model


def on_peft(base: nn.Module) -> nn.Module:
    return with_experts(peft.get_peft_model(base, peft.LoraConfig(**LORA)))


def below_peft(base: nn.Module) -> nn.Module:
    model = peft.get_peft_model(with_experts(base), peft.LoraConfig(**LORA))
    train_lmoe(model)
    return model


def one_layer_with_both(base: nn.Module) -> nn.Module:
    return with_experts(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])))


MODELS = [
    plain, with_a_head, with_compiled_blocks, with_checkpointed_blocks, with_blocks_compiled_and_checkpointed, on_peft,
    below_peft, one_layer_with_both,
]  # fmt: skip


def made(make, base: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make(copy.deepcopy(base))


def train(model: nn.Module, folder: Path, data: list, resume: Path | None = None, **options) -> None:
    options = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", **options}
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", MODELS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(make, tmp_path: Path) -> None:
    base, data = llama(), rows(8)
    whole, first, second = made(make, base), made(make, base), made(make, base, seed=1)
    before = trained_tensors(whole)
    train(whole, tmp_path / "whole", data, max_steps=4)
    train(first, tmp_path / "parts", data, max_steps=2, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    train(second, tmp_path / "parts", data, resume=checkpoint, max_steps=4)
    expected, resumed = trained_tensors(whole), trained_tensors(second)
    assert len(expected) >= 7
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
        assert not torch.equal(before[name], tensor), name
    fresh = llama()
    fresh.load_state_dict(base.state_dict())
    loaded = peft.PeftModel.from_pretrained(fresh, checkpoint) if isinstance(first, peft.PeftModel) else fresh
    load_lmoe(loaded, checkpoint)
    torch.testing.assert_close(loaded(IDS).logits, first.eval()(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("make", [on_peft, below_peft])
def test_a_peft_model_refuses_experts_of_another_model(make, tmp_path: Path) -> None:
    model = made(make, llama())
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(llama(), peft.LoraConfig(**LORA))
    apply_lmoe(other, "q_proj", num_experts=2, rank=2)
    wider = with_experts(peft.get_peft_model(wider_llama(), peft.LoraConfig(**LORA)))
    of_other_options = with_experts(peft.get_peft_model(llama(), peft.LoraConfig(**LORA)), mixing="outputs")
    for refused in (other, wider, of_other_options):
        before = copy.deepcopy(refused.state_dict())
        with pytest.raises(ValueError, match="load_adapter: model must have the L-MoE layers that were saved to"):
            refused.load_adapter(tmp_path, "default")
        assert all(torch.equal(tensor, before[name]) for name, tensor in refused.state_dict().items())
    (tmp_path / "lmoe.safetensors").unlink()
    other.load_adapter(tmp_path, "default")  # only PEFT's adapter is left


def wider_llama() -> nn.Module:
    config = copy.deepcopy(llama().config)
    config.intermediate_size += 8
    return LlamaForCausalLM(config).double()


@pytest.mark.parametrize("make", [on_peft, one_layer_with_both])
def test_a_gathered_state_dict_of_a_peft_model_is_saved(make, tmp_path: Path) -> None:
    """Trainer passes one under FSDP."""
    model = made(make, llama())
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "own")
    for name in ("lmoe.safetensors", "adapter_model.safetensors"):
        given, own = load_file(tmp_path / "given" / name), load_file(tmp_path / "own" / name)
        assert given.keys() == own.keys()
        assert all(torch.equal(tensor, own[key]) for key, tensor in given.items())
    assert (tmp_path / "given" / "lmoe_config.json").read_text() == (tmp_path / "own" / "lmoe_config.json").read_text()


@pytest.mark.parametrize("make", [plain, on_peft])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["itself", "a copy", "pickled"])  # fmt: skip
def test_removing_the_layers_restores_the_methods_of_the_model(make, copied, tmp_path: Path) -> None:
    model = copied(made(make, llama()))
    model.save_pretrained(tmp_path / "with")
    assert (tmp_path / "with" / "lmoe.safetensors").exists()
    remove_lmoe(model)
    for part in model.modules():
        assert not {"save_pretrained", "load_adapter"} & vars(part).keys()
        assert not part._load_state_dict_pre_hooks
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "lmoe.safetensors").exists()
