"""Experts are balanced without a loss: the bias of the choice moves by the load, over processes and micro-batches."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

from lmoe_kernels import apply_lmoe, balance_callback, balance_experts, lmoe_layers, load_lmoe, save_lmoe
from tests.adapters import TwoAdapters
from tests.models import llama
from tests.processes import on_two_processes
from tests.training import arguments, rows


def skewed(experts: int = 6) -> nn.Module:
    """A layer whose router sends nearly all tokens to the first two experts."""
    model = nn.Sequential(nn.Linear(8, 4)).double()
    apply_lmoe(model, ["0"], num_experts=experts, rank=2, top_k=2, choice_bias=True, gate_bias=True)
    with torch.no_grad():
        model[0].gate_bias.copy_(torch.tensor([3.0, 2.5] + [0.0] * (experts - 2)))
    return model


def shares(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The share of each expert in the choices."""
    layer = model[0]
    layer.load.zero_()
    model.train()(x)
    share = layer.load / layer.load.sum()
    layer.load.zero_()
    return share


def test_a_skewed_router_becomes_balanced() -> None:
    model, x = skewed(), torch.randn(400, 8, dtype=torch.float64)
    before = shares(model, x)
    assert before.max() > 0.4
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(120):
        model(torch.randn(400, 8, dtype=torch.float64))
        balance_experts(model, speed=0.05)
    after = shares(model, x)
    assert after.max() < 0.23
    assert after.min() > 0.11
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


def test_the_step_is_the_definition() -> None:
    layer = TwoAdapters(nn.Linear(8, 4).double(), top_k=2, choice_bias=True)
    model = nn.ModuleDict({"tuner": layer, "plain": skewed(), "without tokens": skewed()})
    for part in ("tuner", "plain"):
        model[part](torch.randn(50, 8, dtype=torch.float64))
    expected = []
    counted = [(layer.mixtures()[name].tensors["choice_bias"], load) for name, load in layer.loads().items()]
    counted += [(model[part][0].choice_bias, model[part][0].load) for part in ("plain", "without tokens")]
    for bias, load in counted:
        bias.copy_(torch.randn(len(bias)))
        expected.append(bias + 0.25 * torch.sign(load.mean() - load))
    assert not torch.equal(expected[2], counted[2][0])
    assert torch.equal(expected[3], counted[3][0])
    balance_experts(model, speed=0.25)
    for (bias, load), right in zip(counted, expected, strict=True):
        assert torch.equal(bias, right)
        assert not load.any()
    balance_experts(model)
    assert all(torch.equal(bias, right) for (bias, _), right in zip(counted, expected, strict=True))


def test_the_bias_is_saved(tmp_path: Path) -> None:
    def balanced(model: nn.Module) -> nn.Module:
        apply_lmoe(model, ["q_proj"], num_experts=4, rank=2, top_k=2, choice_bias=True)
        for layer in lmoe_layers(model).values():
            layer.choice_bias.normal_()
        return model

    model, other = balanced(llama()), llama()
    model.train()(torch.arange(8)[None])
    save_lmoe(model, tmp_path)
    by_state_dict = balanced(llama())
    by_state_dict.load_state_dict(model.state_dict())
    for loaded in (other, balanced(llama()), by_state_dict):
        if loaded is not by_state_dict:
            load_lmoe(loaded, tmp_path)
        pairs = zip(lmoe_layers(loaded).values(), lmoe_layers(model).values(), strict=True)
        for ours, saved in pairs:
            assert torch.equal(ours.choice_bias, saved.choice_bias)
            assert not ours.load.any()


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpointing"])
def test_trainer_balances_once_a_step(options: dict, tmp_path: Path) -> None:
    model = llama()
    apply_lmoe(model, "all-linear", num_experts=4, rank=2, top_k=2, choice_bias=True)
    layers = list(lmoe_layers(model).values())
    options |= {"max_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = Trainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=rows(16),
        eval_dataset=rows(4),
        callbacks=[balance_callback(0.5)],
    )
    trainer.train()
    for layer in layers:
        assert (layer.choice_bias.abs() <= 1.5).all()
        assert (layer.choice_bias / 0.5 == (layer.choice_bias / 0.5).round()).all()
        assert not layer.load.any()
    assert any(layer.choice_bias.any() for layer in layers)
    trainer.evaluate()
    assert not any(layer.load.any() for layer in layers)


def _on_one_process(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    model, whole = skewed(), skewed()
    whole.load_state_dict(model.state_dict())
    ddp = nn.parallel.DistributedDataParallel(model)
    for _ in range(5):
        micro_batches = torch.randn(2, 2, 31, 8, dtype=torch.float64)  # of both processes
        with ddp.no_sync():
            ddp(micro_batches[0, rank]).sum().backward()
        ddp(micro_batches[1, rank]).sum().backward()
        whole(micro_batches)
        balance_experts(ddp, speed=0.3)
        alone = whole[0].load
        whole[0].choice_bias.add_(0.3 * torch.sign(alone.mean() - alone))
        alone.zero_()
        assert torch.equal(model[0].choice_bias, whole[0].choice_bias)
        assert not model[0].load.any()
    assert model[0].choice_bias.any()
    sharded = fully_shard(nn.Sequential(TwoAdapters(nn.Linear(8, 4).double(), top_k=2, choice_bias=True)))
    with pytest.raises(ValueError, match=r"choice_bias must be whole in every process, so leave it out of FSDP"):
        balance_experts(sharded)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_two_processes_agree() -> None:
    on_two_processes(_on_one_process)


def test_refusals(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match="balance_experts: model must have layers with choice_bias=True, got none"):
        balance_experts(model)
    with pytest.raises(ValueError, match="balance_callback: model must have layers with choice_bias=True, got none"):
        Trainer(model, arguments(tmp_path), train_dataset=rows(2), callbacks=[balance_callback()]).train()
    with pytest.raises(ValueError, match="balance_callback: speed must be a number of at least 0, got -1"):
        balance_callback(-1)
    balanced = skewed()
    with pytest.raises(TypeError, match="balance_experts: speed must be a number of at least 0, got str"):
        balance_experts(balanced, "fast")
