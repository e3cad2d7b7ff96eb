"""Shared routers in everything around the layers: checkpoints, named experts, composition, what is trained."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from lmoe_kernels import (
    add_expert,
    apply_lmoe,
    auxiliary_loss,
    export_expert,
    freeze_expert,
    freeze_gates,
    from_lora_adapters,
    lmoe_layers,
    load_lmoe,
    parameter_groups,
    remove_expert,
    save_lmoe,
    train_lmoe,
    warmup,
)  # fmt: skip
from lmoe_kernels.compilation import _call, _sources
from tests.integration.test_compose import saved as saved_loras
from tests.integration.test_routers import ROUTERS, routed, routers
from tests.models import IDS, llama, state

FIRST = "model.layers.0.self_attn.q_proj"


def plain_of(model: nn.Module) -> nn.Module:
    """A plain model with the frozen weights of this one."""
    plain = llama()
    plain.load_state_dict({k.replace(".frozen_layer", ""): t for k, t in model.state_dict().items() if "lora_" not in k
                           and ".router." not in k})  # fmt: skip
    return plain


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_save_and_load(scope: str, reads: str, tmp_path: Path) -> None:
    model = routed(scope, reads)
    expected, plain = model(IDS).logits, plain_of(model)
    save_lmoe(model, tmp_path)
    tensors = load_file(tmp_path / "lmoe.safetensors")
    assert f"{FIRST}.router.gate_weight" in tensors
    fresh = copy.deepcopy(plain)
    load_lmoe(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, expected)
    other = copy.deepcopy(model)
    for router in routers(other):
        nn.init.normal_(router.gate_weight)
    assert not torch.equal(other(IDS).logits, expected)
    load_lmoe(other, tmp_path)
    assert torch.equal(other(IDS).logits, expected)
    missing = other.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert not any("frozen_layer" in key for key in missing)
    other.load_state_dict(model.state_dict(), strict=True)
    model.save_pretrained(tmp_path / "model")
    again = copy.deepcopy(plain)
    load_lmoe(again, tmp_path / "model")
    assert torch.equal(again(IDS).logits, expected)


def test_the_defaults_are_not_written(tmp_path: Path) -> None:
    """So older releases can read files that do not use routers."""
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=1)
    save_lmoe(model, tmp_path)
    assert not any(
        "router" in options for options in json.loads((tmp_path / "lmoe_config.json").read_text())["layers"].values()
    )


def _without(tensors: dict[str, Any]) -> None:
    del tensors[f"{FIRST}.router.gate_weight"]


def _misshapen(tensors: dict[str, Any]) -> None:
    tensors[f"{FIRST}.router.gate_weight"] = torch.zeros(3, 15)


def _unknown(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.k_proj.router.gate_weight"] = torch.zeros(3, 16)


DAMAGES = [
    (_without, f"load_lmoe: lmoe.safetensors must hold '{FIRST}.router.gate_weight', got none of that name"),
    (_misshapen, f"load_lmoe: tensor '{FIRST}.router.gate_weight' must have shape (3, 16), got (3, 15)"),
    (_unknown, "got 1 unknown: 'model.layers.0.self_attn.k_proj.router.gate_weight'"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGES)
@pytest.mark.parametrize("has_layers", [False, True])
def test_a_router_that_does_not_fit(damage: Any, text: str, has_layers: bool, tmp_path: Path) -> None:
    save_lmoe(routed("block", "prefix"), tmp_path)
    file = tmp_path / "lmoe.safetensors"
    tensors, config = load_file(file), (tmp_path / "lmoe_config.json").read_text()
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt", "lmoe_config": config})
    model = routed("block", "prefix") if has_layers else llama()
    before, values = state(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        load_lmoe(model, tmp_path)
    assert str(caught.value).endswith(text)
    assert state(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_several_directories(tmp_path: Path) -> None:
    """Layers of one router must come from one directory, because each directory has a router of its own."""
    model = llama()
    for layer in (0, 1):
        one = copy.deepcopy(model)
        apply_lmoe(one, rf"model\.layers\.{layer}\..*(q_proj|up_proj)", num_experts=2, rank=1, router="block")
        save_lmoe(one, tmp_path / str(layer))
    assert len(load_lmoe(model, [tmp_path / "0", tmp_path / "1"])) == 4
    assert len(routers(model)) == 2
    for name in ("q_proj", "up_proj"):
        one = llama()
        apply_lmoe(one, name, num_experts=2, rank=1, router="block")
        save_lmoe(one, tmp_path / name)
    fresh = llama()
    with pytest.raises(ValueError, match=r"^load_lmoe: \S+ must hold only tensors .* got 2 unknown: \S+up_proj"):
        load_lmoe(fresh, [tmp_path / "q_proj", tmp_path / "up_proj"])
    assert not lmoe_layers(fresh)


@pytest.mark.parametrize("scope", ["group", "block", "model"])
def test_experts_are_added_and_removed_once(scope: str, tmp_path: Path) -> None:
    model = routed(scope, "token", mixing="outputs", output_router_logits=True)
    expected = model(IDS).logits
    before = {id(router): router.gate_weight.detach().clone() for router in routers(model)}
    add_expert(model, "new")
    for router in routers(model):
        assert router.gate_weight.shape == (4, 16 if router.features == 16 else 24)
        assert torch.equal(router.gate_weight[:3], before[id(router)])
        assert router.gate_weight.requires_grad
    model(IDS)
    gates = torch.cat([layer.router_logits.softmax(-1)[..., 3].flatten() for layer in lmoe_layers(model).values()])
    assert 0 < gates.max() <= torch.tensor(-4.0).exp()
    save_lmoe(model, tmp_path / "four")
    remove_expert(model, "new")
    assert torch.equal(model(IDS).logits, expected)
    remove_expert(model, "1")
    for router in routers(model):
        assert torch.equal(router.gate_weight, before[id(router)][[0, 2]])
    export_expert(model, "2", tmp_path / "lora")
    assert not any("router" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))


def test_layers_of_one_router_have_the_same_experts() -> None:
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=1, router="block", expert_names=["a", "b"])
    with pytest.raises(ValueError, match=r"k_proj must have expert_names=\('a', 'b'\) like \S+, with which it"):
        apply_lmoe(model, "k_proj", num_experts=2, rank=1, router="block", expert_names=["a", "c"])


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_loras_are_composed(scope: str, reads: str, tmp_path: Path) -> None:
    """Equal gates at first, so the router changes nothing; then it is trained alone."""
    plain = llama()
    directories = saved_loras(plain, tmp_path)
    del directories["c"]  # whose LoRA has layers outside of the blocks
    own = copy.deepcopy(plain)
    from_lora_adapters(own, directories)
    from_lora_adapters(plain, directories, router=scope, router_reads=reads)
    torch.testing.assert_close(plain(IDS).logits, own(IDS).logits, rtol=1e-9, atol=1e-9)
    for layer in lmoe_layers(plain).values():
        layer.lora_a.requires_grad_(False)
        layer.lora_b.requires_grad_(False)
    assert {id(p) for p in plain.parameters() if p.requires_grad} == {
        id(p) for router in routers(plain) for p in router.parameters()
    }
    plain(IDS).logits.square().mean().backward()
    assert all(router.gate_weight.grad.any() for router in routers(plain))


def test_routers_are_gates() -> None:
    model = routed("block", "token", output_router_logits=True)
    of_routers = {id(p) for router in routers(model) for p in router.parameters()}
    _, gates = parameter_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.1)
    assert {id(p) for p in gates["params"]} == of_routers
    assert (gates["lr"], gates["weight_decay"]) == (1e-2, 0.0)
    freeze_gates(model)
    assert {id(p) for p in model.parameters() if not p.requires_grad} >= of_routers
    train_lmoe(model)
    assert all(p.requires_grad for p in model.parameters() if id(p) in of_routers)
    freeze_expert(model, "1")
    model(IDS)
    auxiliary_loss(model).backward()
    assert all(router.gate_weight.grad.any() for router in routers(model))


def test_warmup_expects_the_logits_of_a_router() -> None:
    model = routed("block", "token")
    assert warmup(model, tokens=8) == 0  # no Triton on a CPU
    (source,) = _sources(FIRST, lmoe_layers(model)[FIRST])
    _, _, dtypes, *_, wanted = _call(source, torch.float64, 0.0, True)
    assert dtypes[2:] == (None, None, torch.float64)
    assert wanted.gate_logits
    for layer in lmoe_layers(model).values():
        layer.lora_a.requires_grad_(False)
        layer.lora_b.requires_grad_(False)
    (source,) = _sources(FIRST, lmoe_layers(model)[FIRST])
    assert _call(source, torch.float64, 0.0, True)[-1].gate_logits
    assert not _call(source, torch.float64, 0.0, False)[-1].gate_logits


@pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed package")
@pytest.mark.parametrize(("scope", "reads"), [("group", "prefix"), ("block", "prefix"), ("model", "token")])
def test_sharded_models(scope: str, reads: str, tmp_path: Path) -> None:
    """FSDP2 with one unit for each block: gradients are those of the plain model, and files hold whole routers."""
    from torch.distributed.fsdp import fully_shard

    model = routed(scope, reads)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = copy.deepcopy(model)
        for block in sharded.model.layers:
            fully_shard(block)
        fully_shard(sharded)
        for one in (model, sharded):
            one(IDS).logits.square().mean().backward()
        for name, parameter in sharded.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad.full_tensor(), model.get_parameter(name).grad, msg=name)
        save_lmoe(model, tmp_path / "plain")
        for router in routers(sharded):
            nn.init.zeros_(router.gate_weight)
        load_lmoe(sharded, tmp_path / "plain")
        save_lmoe(sharded, tmp_path / "sharded")
    finally:
        distributed.destroy_process_group()
    files = [load_file(tmp_path / kind / "lmoe.safetensors") for kind in ("plain", "sharded")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
