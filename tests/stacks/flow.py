"""What is checked in every stack: it trains, saves whole tensors, loads into a plain model, and resumes bitwise."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from lmoe_kernels import lmoe_layers, load_lmoe, save_lmoe
from lmoe_kernels.distributed import is_sharded
from lmoe_kernels.naming import plain_modules
from tests.models import llama, with_experts

STEPS, MORE = 2, 2
HALVES = 2


class Stack(NamedTuple):
    """A wrapper of a model, and how a plain training computes the same numbers."""

    wrap: Callable[[nn.Module], nn.Module]
    base: torch.dtype = torch.float64  # of the frozen layers
    computed: torch.dtype | None = None  # what parameters are cast to for forward and backward
    adapter: Callable[[nn.Module], nn.Module] | None = None  # adds another library's adapter to the plain model
    apart: bool = False  # the frozen layers are wrapped themselves: their products are rounded before the delta is added


def flow(stack: Stack, seed: int, folder: Path) -> Iterator[str]:
    """Yield the name of each part that passed. Each of two processes takes half of every batch; a single one takes both."""
    model, optimizer = wrapped(stack, seed)
    train(model, optimizer, seed, 0, STEPS)
    plain = plain_training(stack, seed, STEPS)
    save_lmoe(model, folder / "adapter")
    barrier()
    found = load_file(folder / "adapter" / "lmoe.safetensors")
    equal(found, plain, "after training")
    if not is_sharded(model):  # each process holds the whole model: all must be the same
        equal(learned(model), plain, "on this process")
    yield "trains"

    assert sorted(file.name for file in (folder / "adapter").iterdir()) == ["lmoe.safetensors", "lmoe_config.json"]
    save_lmoe(model, folder / "again")
    equal(load_file(folder / "again" / "lmoe.safetensors"), found, "saved twice")
    yield "saves"

    fresh = plain_model(stack, seed + 1, experts=False)
    names = load_lmoe(fresh, folder / "adapter")
    assert len(names) == 4
    assert not any("module" in name or name[0] == "_" for name in names)
    save_lmoe(fresh, folder / f"fresh-{rank()}")
    equal(load_file(folder / f"fresh-{rank()}" / "lmoe.safetensors"), found, "in a plain model")
    yield "loads elsewhere"

    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, seed, STEPS, MORE)
    save_lmoe(model, folder / "on")
    resumed, optimizer = wrapped(stack, seed, other_experts=True)
    load_lmoe(resumed, folder / "adapter")
    optimizer.load_state_dict(state)
    train(resumed, optimizer, seed, STEPS, MORE)
    save_lmoe(resumed, folder / "resumed")
    barrier()
    on = load_file(folder / "on" / "lmoe.safetensors")
    assert any(not torch.equal(tensor, found[key]) for key, tensor in on.items())
    equal(load_file(folder / "resumed" / "lmoe.safetensors"), on, "resumed")
    yield "resumes"


def plain_model(stack: Stack, seed: int, experts: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    model = llama().to(stack.base)
    if experts and stack.adapter is not None:
        model = stack.adapter(model)
    if experts:
        with_experts(model, modules_to_save=["lm_head"])
    return model.train()


def wrapped(stack: Stack, seed: int, other_experts: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = plain_model(stack, seed)
    if other_experts:
        for parameter in trained(model):
            nn.init.normal_(parameter)
    model = stack.wrap(model)
    return model, adamw(model)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2)


def half(seed: int, step: int, which: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randint(0, 32, (2 * HALVES, 12), generator=generator).chunk(HALVES)[which]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, first: int, steps: int) -> None:
    mine = [rank()] if distributed.is_initialized() else range(HALVES)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for which in mine:
            ids = half(seed, step, which)
            (model(ids, labels=ids).loss / len(mine)).backward()
        optimizer.step()


def plain_training(stack: Stack, seed: int, steps: int) -> dict[str, Tensor]:
    """The same arithmetic in one process: it averages the gradients of the two halves, bitwise as two processes do."""
    model = plain_model(stack, seed)
    for layer in lmoe_layers(model).values() if stack.apart else ():
        layer.frozen_layer.register_forward_hook(lambda *_: None)  # a layer with a hook is called by itself
    optimizer = adamw(model)
    for step in range(steps):
        sums = [torch.zeros_like(p, dtype=stack.computed) for p in trained(model)]
        for which in range(HALVES):
            computed = copy.deepcopy(model)
            for parameter in computed.parameters():
                parameter.data = parameter.data.to(stack.computed)
            ids = half(seed, step, which)
            computed(ids, labels=ids).loss.backward()
            for total, parameter in zip(sums, trained(computed), strict=True):
                total += parameter.grad / HALVES
        for parameter, total in zip(trained(model), sums, strict=True):
            parameter.grad = total.to(parameter.dtype)
        optimizer.step()
    return learned(model)


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that L-MoE trains, of a model that is whole on this process."""
    owners = {**lmoe_layers(model), "lm_head": plain_modules(model)["lm_head"]}
    return {
        f"{name}.{key}": p.detach() for name, owner in owners.items() for key, p in owner.named_parameters(recurse=False)
    }


def equal(found: dict[str, Tensor], true: dict[str, Tensor], when: str) -> None:
    assert found.keys() == true.keys(), f"{when}: {found.keys() ^ true.keys()}"
    for name, tensor in found.items():
        assert torch.equal(tensor, true[name]), f"{when}: {name} differs by {(tensor - true[name]).abs().max()}"


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()
