"""What an optimizer trains: parameter groups, frozen gates, frozen experts."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop
from transformers import Trainer

from lmoe_kernels import apply_lmoe, freeze_expert, freeze_gates, lmoe_layers, load_lmoe, parameter_groups, save_lmoe
from lmoe_kernels.adapter import read_adapter
from lmoe_kernels.mixture import Mixture
from tests.adapters import TwoAdapters
from tests.models import IDS, llama, with_experts
from tests.processes import on_two_processes
from tests.training import arguments, rows

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: Adam(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "one by one": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, foreach=False, amsgrad=True),
    "NAdam": lambda p: NAdam(p, lr=0.1, weight_decay=0.1),
    "Adagrad": lambda p: Adagrad(p, lr=0.1, weight_decay=0.1),
    "Adadelta": lambda p: Adadelta(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Rprop": lambda p: Rprop(p, lr=0.1),
}


def small(**options) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 7)).double()
    apply_lmoe(model, ["0", "2"], num_experts=3, rank=2, **options)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def backward(model: nn.Module) -> None:
    model(torch.randn(9, 5, dtype=torch.float64)).square().sum().backward()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def rows_of(model: nn.Module, expert: int) -> list[torch.Tensor]:
    return [t[expert].detach().clone() for layer in lmoe_layers(model).values() for t in (layer.lora_a, layer.lora_b)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


# Parameter groups


def test_groups_of_both_kinds_of_layers() -> None:
    model = nn.ModuleDict({"a": small(gate_bias=True, modules_to_save=["1"]), "b": TwoAdapters(nn.Linear(3, 4))})
    model["tied"] = model["a"][0]  # a layer with two names counts once
    groups = parameter_groups(model, lr=0.1, gate_lr=0.5, weight_decay=0.01)
    first, third, of_b = model["a"][0], model["a"][2], model["b"]
    experts = [t for layer in (first, third) for t in (layer.lora_a, layer.lora_b)]
    experts += [of_b.get_submodule(a)[k] for a in ("first", "second") for k in ("lora_a", "lora_b")]
    gates = [first.gate_weight, first.gate_bias, third.gate_weight, third.gate_bias]
    gates += [of_b.get_submodule(a)["gate_weight"] for a in ("first", "second")]
    norms = [model["a"][1].weight, model["a"][1].bias]
    expected = [(experts, 0.1, 0.01), (gates, 0.5, 0.0), (norms, 0.1, 0.0)]
    for group, (parameters, lr, weight_decay) in zip(groups, expected, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in parameters}
        assert len(group["params"]) == len(parameters)
        assert (group["lr"], group["weight_decay"]) == (lr, weight_decay)
    freeze_gates(model)
    assert len(parameter_groups(model, lr=0.1)) == 2
    AdamW(groups)  # takes them


def test_matrices_of_modules_to_save_decay_and_the_gates_have_the_common_rate_by_default() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    apply_lmoe(model, "0", num_experts=2, rank=2, modules_to_save="1")
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (2, 0.1, 0.3), (1, 0.1, 0.0), (1, 0.1, 0.3), (1, 0.1, 0.0)
    ]  # fmt: skip
    assert groups[2]["params"] == [model[1].weight]


def test_trainer_keeps_the_rates_apart(tmp_path: Path) -> None:
    model = with_experts(llama())
    optimizer = AdamW(parameter_groups(model, lr=1e-3, gate_lr=1e-2))
    trainer = Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=rows(8), optimizers=(optimizer, None))
    trainer.train()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    assert optimizer.param_groups[0]["lr"] * 10 == pytest.approx(optimizer.param_groups[1]["lr"])
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())


def test_refusals_of_groups() -> None:
    model = small()
    with pytest.raises(ValueError, match="parameter_groups: gate_lr must be a number of at least 0, got -1"):
        parameter_groups(model, lr=0.1, gate_lr=-1)
    with pytest.raises(TypeError, match="parameter_groups: lr must be a number of at least 0, got str"):
        parameter_groups(model, lr="0.1")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="parameter_groups: model must have parameters that require a gradient, got none"):
        parameter_groups(model, lr=0.1)


# Gates


def test_frozen_gates() -> None:
    model = small(gate_bias=True)
    before = [(layer.gate_weight.clone(), layer.gate_bias.clone()) for layer in lmoe_layers(model).values()]
    experts = rows_of(model, 0)
    freeze_gates(model)
    step(model, AdamW(parameter_groups(model, lr=0.1, weight_decay=0.1)))
    for layer, (weight, bias) in zip(lmoe_layers(model).values(), before, strict=True):
        assert torch.equal(layer.gate_weight, weight)
        assert torch.equal(layer.gate_bias, bias)
        assert layer.lora_a.requires_grad
    assert not same(rows_of(model, 0), experts)
    freeze_gates(model, False)
    assert all(layer.gate_weight.requires_grad and layer.gate_bias.requires_grad for layer in lmoe_layers(model).values())


def test_gates_of_inactive_adapters_stay_as_they_are() -> None:
    layer = TwoAdapters(nn.Linear(3, 4), active=("first",))
    layer.get_submodule("second").requires_grad_(False)
    for frozen in (True, False):
        freeze_gates(layer, frozen)
        assert layer.get_submodule("first")["gate_weight"].requires_grad is not frozen
        assert not layer.get_submodule("second")["gate_weight"].requires_grad
    assert layer.get_submodule("first")["lora_a"].requires_grad


# Experts


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_expert_keeps_its_rows_bit_for_bit(name: str) -> None:
    """Momentum of earlier steps and weight decay move rows whose gradient is zero."""
    model = small()
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    freeze_expert(model, "1")
    frozen, other = rows_of(model, 1), rows_of(model, 2)
    gates = [layer.gate_weight[1].clone() for layer in lmoe_layers(model).values()]
    for _ in range(3):
        step(model, optimizer)
    assert same(rows_of(model, 1), frozen)
    assert not any(map(torch.equal, rows_of(model, 2), other))
    assert not any(map(torch.equal, (layer.gate_weight[1] for layer in lmoe_layers(model).values()), gates))
    freeze_expert(model, "1", False)
    step(model, optimizer)
    assert not any(map(torch.equal, rows_of(model, 1), frozen))


def test_the_gradient_norm_does_not_count_a_frozen_expert() -> None:
    model, x = small(), torch.randn(9, 5, dtype=torch.float64)
    model(x).square().sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    freeze_expert(model, "0")
    for accumulated in (1, 2):
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected = accumulated * whole[name]
                if "lora" in name:
                    expected[0] = 0
                assert torch.equal(parameter.grad, expected), name
    lora_b = lmoe_layers(model)["0"].lora_b
    lora_b.grad = None
    lora_b.sum().backward()  # its gradient is one number, expanded
    assert torch.equal(lora_b.grad[:, 0, 0], torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


def test_a_shared_a_stays_trained() -> None:
    model = small(shared_a=True)
    freeze_expert(model, "2")
    before = [(layer.lora_a.clone(), layer.lora_b.clone()) for layer in lmoe_layers(model).values()]
    step(model, SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    for layer, (lora_a, lora_b) in zip(lmoe_layers(model).values(), before, strict=True):
        assert not torch.equal(layer.lora_a, lora_a)
        assert torch.equal(layer.lora_b[2], lora_b[2])
        assert not torch.equal(layer.lora_b[1], lora_b[1])


def test_a_copy_has_frozen_experts_of_its_own() -> None:
    model = small()
    freeze_expert(model, "1")
    copied = copy.deepcopy(model)
    freeze_expert(model, "1", False)
    for _ in range(2):
        before = rows_of(copied, 1)
        optimizer = SGD(copied.parameters(), lr=0.1, weight_decay=0.1)
        step(copied, optimizer)
        assert same(rows_of(copied, 1), before)
        assert all((layer.lora_b.grad[1] == 0).all() for layer in lmoe_layers(copied).values())
    before = rows_of(model, 1)
    step(model, SGD(model.parameters(), lr=0.1))
    assert not same(rows_of(model, 1), before)


def test_it_stays_the_same_expert_if_another_is_removed() -> None:
    model = small(expert_names=["law", "code", "news"])
    freeze_expert(model, "code")
    for layer in lmoe_layers(model).values():
        (mixture,) = layer.mixtures().values()
        config = mixture.config._replace(num_experts=2, expert_names=("code", "news"))
        layer.set_mixture("default", Mixture(config, {key: t.detach()[1:].clone() for key, t in mixture.tensors.items()}))
    frozen, other = rows_of(model, 0), rows_of(model, 1)
    step(model, SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    assert all((layer.lora_a.grad[0] == 0).all() and layer.lora_a.grad[1].any() for layer in lmoe_layers(model).values())
    assert same(rows_of(model, 0), frozen)
    assert not any(map(torch.equal, rows_of(model, 1), other))


def test_one_adapter_or_all_that_have_the_name() -> None:
    for adapter, frozen_in in ((None, {"first", "second"}), ("second", {"second"})):
        layer = TwoAdapters(nn.Linear(5, 4).double())
        layer._configs["first"] = layer._configs["first"]._replace(expert_names=None)
        freeze_expert(layer, "2", adapter=adapter)
        before = {name: layer.get_submodule(name)["lora_b"][2].clone() for name in ("first", "second")}
        step(layer, SGD(layer.parameters(), lr=0.1, weight_decay=0.1))
        kept = {name for name, row in before.items() if torch.equal(layer.get_submodule(name)["lora_b"][2], row)}
        assert kept == frozen_in


def test_two_optimizers_and_a_step_that_fails() -> None:
    model = small()
    freeze_expert(model, "0")
    first, second = lmoe_layers(model).values()
    optimizers = [SGD(layer.parameters(), lr=0.1, weight_decay=0.1) for layer in (first, second)]
    before = rows_of(model, 0)
    backward(model)

    def closure() -> float:
        optimizers[1].step()  # within the step of the other
        return 0.0

    optimizers[0].step(closure)
    assert same(rows_of(model, 0), before)

    def fails() -> float:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        optimizers[0].step(fails)
    optimizers[0].step()
    assert same(rows_of(model, 0), before)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model(fullgraph: bool) -> None:
    model = small()
    freeze_expert(model, "0")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    before, optimizer = rows_of(model, 0), AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        step(compiled, optimizer)
    assert same(rows_of(model, 0), before)
    assert all((layer.lora_a.grad[0] == 0).all() and layer.lora_a.grad[1].any() for layer in lmoe_layers(model).values())


def test_a_discarded_model_is_freed() -> None:
    model = small()
    freeze_expert(model, "0")
    step(model, SGD(model.parameters(), lr=0.1))
    freed = weakref.ref(model[0])
    del model
    gc.collect()
    assert freed() is None


def test_a_checkpoint_does_not_contain_it(tmp_path: Path) -> None:
    model, other = with_experts(llama()), with_experts(llama())
    save_lmoe(model, tmp_path / "before")
    freeze_expert(model, "0")
    freeze_gates(model)
    save_lmoe(model, tmp_path / "after")
    files = [read_adapter("load_lmoe", tmp_path / name) for name in ("before", "after")]
    assert files[0]._replace(tensors={}) == files[1]._replace(tensors={})
    assert all(torch.equal(tensor, files[1].tensors[name]) for name, tensor in files[0].tensors.items())
    load_lmoe(model, tmp_path / "before")
    load_lmoe(other, tmp_path / "after")
    for frozen, one in ((True, model), (False, other)):
        before = rows_of(one, 0)
        optimizer = SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        one(IDS, labels=IDS).loss.backward()
        optimizer.step()
        assert same(rows_of(one, 0), before) is frozen


def test_refusals_of_names() -> None:
    model = small(expert_names=["law", "code", "news"])
    with pytest.raises(ValueError) as caught:
        freeze_expert(model, "cod")
    assert str(caught.value) == "freeze_expert: name must be the name of an expert, got 'cod'; nearest: 'code'"
    layer = TwoAdapters(nn.Linear(3, 4))
    with pytest.raises(
        ValueError, match="freeze_expert: adapter must be an adapter of the model, got 'frist'; nearest: 'first'"
    ):
        freeze_expert(layer, "law", adapter="frist")
    with pytest.raises(ValueError, match="name must be the name of an expert, got 'law'; nearest: '0', '1', '2'"):
        freeze_expert(layer, "law", adapter="second")
    for function in (freeze_gates, lambda model: freeze_expert(model, "0")):
        with pytest.raises(ValueError, match=r"model must have layers with experts \(see apply_lmoe\), got none"):
            function(nn.Linear(2, 2))
    assert "_frozen_experts" not in vars(layer)


# Two processes


def _on_one_process(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    before_ddp, after_ddp = small(), small()
    freeze_expert(before_ddp, "1")
    for model in (before_ddp, after_ddp):
        ddp = DistributedDataParallel(model)
        if model is after_ddp:
            freeze_expert(ddp, "1")
        optimizer = AdamW(parameter_groups(ddp, lr=0.1, weight_decay=0.1))
        before, others = rows_of(model, 1), rows_of(model, 2)
        torch.manual_seed(rank)
        for _ in range(2):
            step(ddp, optimizer)
            assert all((layer.lora_b.grad[1] == 0).all() for layer in lmoe_layers(model).values())
        assert same(rows_of(model, 1), before)
        assert not any(map(torch.equal, rows_of(model, 2), others))
    _refuses_fsdp(before_ddp)


def _refuses_fsdp(frozen: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(small())
    with pytest.raises(ValueError) as caught:
        freeze_expert(model, "1")
    assert str(caught.value) == (
        "freeze_expert: model must not be sharded, because a process holds only parts of the experts, got a model of FSDP"
    )
    fully_shard(frozen)
    backward(frozen)
    before = {name: p.full_tensor().clone() for name, p in frozen.named_parameters()}
    with pytest.raises(ValueError, match="freeze_expert: model must not be sharded with a frozen expert"):
        SGD(frozen.parameters(), lr=0.1).step()
    for name, parameter in frozen.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_two_processes() -> None:
    on_two_processes(_on_one_process)
