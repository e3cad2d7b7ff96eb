"""Functions of training on the layers of the tuner: losses, parameter groups, freezing, balancing."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer

from lmoe_kernels import (
    add_auxiliary_loss,
    auxiliary_loss,
    balance_callback,
    balance_experts,
    collect_router_logits,
    freeze_expert,
    freeze_gates,
    parameter_groups,
)
from lmoe_kernels.peft import LMoEConfig
from lmoe_kernels.targets import layers_with_experts
from tests.models import IDS, llama
from tests.training import Recorder, arguments, rows


def tuned(**options) -> PeftModel:
    config = LMoEConfig(num_experts=3, r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(llama(), config)
    for layer in layers_with_experts(model).values():
        nn.init.normal_(layer.mixtures()["default"].tensors["lora_b"])
    return model.train()


def rows_of(model: nn.Module, expert: int, adapter: str = "default") -> list[Tensor]:
    tensors = [layer.mixtures()[adapter].tensors for layer in layers_with_experts(model).values()]
    return [of_layer[key][expert].detach().clone() for of_layer in tensors for key in ("lora_a", "lora_b")]


def test_trainer_counts_the_coefficients_by_label_tokens(tmp_path: Path) -> None:
    model, data = tuned(router_aux_loss_coef=3.0, router_z_loss_coef=0.5), rows(8)
    recorder = Recorder(model)
    options = {"gradient_accumulation_steps": 4}
    Trainer(model, arguments(tmp_path, **options), train_dataset=data, callbacks=[recorder]).train()
    recorder.hook.remove()
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in recorder.batches]
    config = model.peft_config["default"]
    config.router_aux_loss_coef = config.router_z_loss_coef = 0.0
    model.train().zero_grad()
    for batch, count in zip(recorder.batches, tokens, strict=True):
        loss = model(**batch).loss  # divided by the label tokens of the whole step, whose number is in the batch
        added = auxiliary_loss(model, balance=3.0, z=0.5, mask=batch["attention_mask"])
        (loss + count / sum(tokens) * added).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(recorder.gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_add_auxiliary_loss(tmp_path: Path) -> None:
    trainer = Trainer(tuned(output_router_logits=True), arguments(tmp_path), train_dataset=rows(2))
    add_auxiliary_loss(trainer, balance=100.0)
    trainer.train()
    assert next(log["loss"] for log in trainer.state.log_history if "loss" in log) > 90
    trainer = Trainer(tuned(router_z_loss_coef=0.1), arguments(tmp_path), train_dataset=rows(2))
    with pytest.raises(ValueError, match="got coefficients of the adapter 'default', which add them: set these to 0"):
        add_auxiliary_loss(trainer)


def test_the_losses_of_two_adapters_are_summed() -> None:
    model = tuned(router_aux_loss_coef=3.0)
    model.add_adapter(
        "second", LMoEConfig(num_experts=4, r=2, target_modules=["q_proj"], router_z_loss_coef=0.5, task_type="CAUSAL_LM")
    )
    model.base_model.set_adapter(["default", "second"])
    model(IDS)
    names = list(collect_router_logits(model))
    assert [name for name in names if "layers.0" in name] == [
        "model.layers.0.self_attn.q_proj.default", "model.layers.0.self_attn.q_proj.second", "model.layers.0.mlp.down_proj"
    ]  # fmt: skip
    of_first = {name: t for name, t in collect_router_logits(model).items() if not name.endswith("second")}
    of_second = [t for name, t in collect_router_logits(model).items() if name.endswith("second")]
    expected = 3.0 * sum(map(by_definition, of_first.values())) / 4 + 0.5 * sum(map(z_by_definition, of_second)) / 2
    both = model(IDS, labels=IDS).loss
    for config in model.peft_config.values():
        config.router_aux_loss_coef = config.router_z_loss_coef = 0.0
    torch.testing.assert_close(both - model(IDS, labels=IDS).loss, expected.float(), rtol=1e-4, atol=1e-5)


def by_definition(logits: Tensor) -> Tensor:
    flat = logits.flatten(0, 1)
    share = flat.argmax(dim=1).bincount(minlength=flat.shape[1]) / len(flat)
    return flat.shape[1] * (share * flat.softmax(dim=1).mean(dim=0)).sum()


def z_by_definition(logits: Tensor) -> Tensor:
    return logits.logsumexp(dim=-1).square().mean()


def test_groups_have_the_parameters_of_the_active_adapter() -> None:
    model = tuned(gate_bias=True, modules_to_save=["lm_head"])
    model.add_adapter("second", LMoEConfig(num_experts=2, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    groups = parameter_groups(model, lr=0.1, gate_lr=0.5, weight_decay=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = [{names[id(p)].partition("lmoe_")[2].partition(".")[0] for p in group["params"]} for group in groups]
    assert kinds == [{"A", "B"}, {"gate", "gate_bias"}, {""}]
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    assert not any("second" in names[id(p)] for group in groups for p in group["params"])


def test_frozen_gates_are_trained_again_by_set_adapter() -> None:
    model = tuned()
    freeze_gates(model)
    gates = [layer.mixtures()["default"].tensors["gate_weight"] for layer in layers_with_experts(model).values()]
    assert not any(gate.requires_grad for gate in gates)
    model.set_adapter("default")
    assert all(gate.requires_grad for gate in gates)


def test_a_frozen_expert_of_one_adapter() -> None:
    model = tuned()
    freeze_expert(model, "1", adapter="default")
    for one in (model, copy.deepcopy(model)):
        optimizer = AdamW(parameter_groups(one, lr=0.1, weight_decay=0.1))
        frozen, other = rows_of(one, 1), rows_of(one, 2)
        for _ in range(2):
            optimizer.zero_grad()
            one(IDS, labels=IDS).loss.backward()
            optimizer.step()
        assert all(map(torch.equal, rows_of(one, 1), frozen))
        assert not any(map(torch.equal, rows_of(one, 2), other))
        for layer in layers_with_experts(one).values():
            assert (layer.mixtures()["default"].tensors["lora_b"].grad[1] == 0).all()


def test_balancing(tmp_path: Path) -> None:
    model = tuned(top_k=1, renormalize=True, choice_bias=True, router_aux_loss_coef=0.01)
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows(8), callbacks=[balance_callback(0.5)])
    trainer.train()
    biases = [layer.mixtures()["default"].tensors["choice_bias"] for layer in layers_with_experts(model).values()]
    assert any(bias.any() for bias in biases)
    assert all((bias * 2 == (bias * 2).round()).all() for bias in biases)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    for layer, bias in zip(layers_with_experts(again).values(), biases, strict=True):
        assert torch.equal(layer.mixtures()["default"].tensors["choice_bias"], bias)
    model(IDS)
    assert all(layer.loads()["default"].sum() == IDS.numel() for layer in layers_with_experts(model).values())
    balance_experts(model)
    assert not any(layer.loads()["default"].any() for layer in layers_with_experts(model).values())
