"""`fit_router`: gates and routers by ridge regression, compared with least squares on what they read."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, distributed, nn

from lmoe_kernels import apply_lmoe, collect_router_logits, disable_lmoe, fit_router, lmoe_layers
from lmoe_kernels.fitting import RouterFit
from lmoe_kernels.peft import LMoEConfig, LMoETunerLinear
from lmoe_kernels.targets import layers_with_experts
from tests.models import IDS, llama, state

NAMES = ["code", "prose", "lists"]
GATES = [("layer", "token"), ("layer", "prefix"), ("group", "token"), ("group", "prefix"),
         ("block", "token"), ("block", "prefix"), ("model", "token"), ("model", "prefix")]  # fmt: skip


def mixture(model: nn.Module, **options: Any) -> nn.Module:
    apply_lmoe(model, ["q_proj", "k_proj", "v_proj", "down_proj"], num_experts=3, rank=2, expert_names=NAMES, **options)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def domains(lengths: tuple[int, ...] = (12, 3, 7), batches: tuple[int, ...] = (4, 1, 2)) -> dict[str, list[Tensor]]:
    """Token ids out of a third of the vocabulary for each domain, which have different numbers of tokens."""
    return {
        name: [torch.randint(10 * i, 10 * i + 10, (3, length)) for _ in range(count)]
        for i, (name, length, count) in enumerate(zip(NAMES, lengths, batches, strict=True))
    }


def same_fits(fits: dict[str, RouterFit], others: dict[str, RouterFit], within: float = 1e-6) -> None:
    assert fits.keys() == others.keys()
    for name, fit in fits.items():
        assert fit == pytest.approx(others[name], rel=within)


def inputs(model: nn.Module, module: nn.Module, batch: Tensor, with_experts: bool) -> Tensor:
    """The first input of a module of a model."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with nullcontext() if with_experts else disable_lmoe(model), torch.no_grad():
        model(batch)
    handle.remove()
    return seen[0]


def least_squares(of_domains: list[Tensor], ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
    """The weight (E, H) and the bias (E) of the same regression, by torch.linalg.lstsq on rows for the penalty."""
    x = torch.cat([rows / (len(rows) * len(of_domains)) ** 0.5 for rows in of_domains])
    ones = torch.cat([rows.new_ones(len(rows), 1) / (len(rows) * len(of_domains)) ** 0.5 for rows in of_domains])
    y = torch.block_diag(*[rows.new_ones(len(rows), 1) / (len(rows) * len(of_domains)) ** 0.5 for rows in of_domains])
    features = x.shape[1]
    spread = x - ones * (ones * x).sum(dim=0) if bias else x
    strength = (ridge * spread.square().sum() / features).sqrt()
    penalty = strength * torch.eye(features, features + 1, dtype=x.dtype)
    wide = torch.cat([x, ones if bias else torch.zeros_like(ones)], dim=1)
    solution = torch.linalg.lstsq(torch.cat([wide, penalty]), F.pad(y, (0, 0, 0, features)), driver="gelsd").solution
    return solution[:-1].T, solution[-1]


def same_gates(weight: Tensor, bias: Tensor | None, truth: tuple[Tensor, Tensor]) -> None:
    """Gates depend on the differences of the logits alone."""
    torch.testing.assert_close(weight - weight.mean(dim=0), truth[0] - truth[0].mean(dim=0), rtol=1e-7, atol=1e-9)
    if bias is not None:
        torch.testing.assert_close(bias - bias.mean(), truth[1] - truth[1].mean(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("gate_bias", "with_experts"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("router", "reads"), GATES)
def test_equals_least_squares_on_what_the_gates_read(router: Any, reads: Any, gate_bias: bool, with_experts: bool) -> None:
    model = mixture(llama(), router=router, router_reads=reads, gate_bias=gate_bias)
    before = copy.deepcopy(model)
    texts, ridge = domains(), float(torch.rand(())) + 0.01
    fits = fit_router(model, texts, ridge=ridge, sharpness=1.0, with_experts=with_experts)
    checked = 0
    for name, layer in lmoe_layers(model).items():
        gate = layer if layer.gate_weight is not None else layer.router
        if gate is None:
            continue
        blocks = before.model.layers
        place = {"block": blocks[int(name.split(".")[2])], "model": blocks[0]}.get(router, before.get_submodule(name))
        of_domains = []
        for batches in texts.values():
            read = [inputs(before, place, batch, with_experts) for batch in batches]
            if reads == "prefix":
                read = [x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None] for x in read]
            if reads == "prefix" or router in ("block", "model"):
                read = [x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() for x in read]
            of_domains.append(torch.cat([x.flatten(0, 1) for x in read]))
        weight, bias = least_squares(of_domains, ridge, gate_bias)
        same_gates(gate.gate_weight, gate.gate_bias, (weight, bias))
        logits = [rows @ weight.T + bias for rows in of_domains]
        hits = [(of_domain.argmax(dim=1) == i).double().mean() for i, of_domain in enumerate(logits)]
        losses = [F.cross_entropy(rows, torch.full((len(rows),), i)) for i, rows in enumerate(logits)]
        assert fits[name].sharpness == 1.0
        assert fits[name].accuracy == pytest.approx(float(sum(hits)) / 3)
        assert fits[name].loss == pytest.approx(float(sum(losses)) / 3)
        checked += 1
    assert checked == len(fits) == {"layer": 8, "group": 4, "block": 2, "model": 1}[router]


@pytest.mark.parametrize(("router", "reads"), GATES)
def test_finds_the_experts_of_separable_domains(router: Any, reads: Any) -> None:
    model = mixture(llama(), router=router, router_reads=reads, gate_bias=True, output_router_logits=True)
    texts = {name: [ids % 10 % 3 + 10 * i for ids in batches] for i, (name, batches) in enumerate(domains().items())}
    fits = fit_router(model, texts, ridge=1e-4)
    assert fits["model.layers.0.self_attn.q_proj"].accuracy > 0.95
    for i, batches in enumerate(texts.values()):
        model(batches[0])
        gates = collect_router_logits(model)["model.layers.0.self_attn.q_proj"].softmax(dim=-1)
        assert gates[..., i].mean() > 0.8


def test_the_sharpness_is_the_best_of_those_that_are_tried() -> None:
    model, texts = mixture(llama(), gate_bias=True), domains()
    tried = [2 ** (i / 2) for i in range(17)]
    chosen = fit_router(model, texts, with_experts=False)
    weight = lmoe_layers(model)["model.layers.0.mlp.down_proj"].gate_weight.detach().clone()
    fixed = {factor: fit_router(model, texts, sharpness=factor, with_experts=False) for factor in tried}
    for name, fit in chosen.items():
        assert fit.loss == pytest.approx(min(of_factor[name].loss for of_factor in fixed.values()))
        assert fixed[fit.sharpness][name] == fit
    layer = lmoe_layers(model)["model.layers.0.mlp.down_proj"]
    factor = chosen["model.layers.0.mlp.down_proj"].sharpness / tried[-1]
    torch.testing.assert_close(weight, layer.gate_weight * factor)


def test_domains_count_the_same_however_many_tokens_they_have() -> None:
    model, texts = mixture(llama(), router="block", router_reads="prefix"), domains()
    once = fit_router(model, texts, with_experts=False)
    weight = lmoe_layers(model)["model.layers.1.self_attn.q_proj"].router.gate_weight.detach().clone()
    same_fits(fit_router(model, {**texts, "prose": texts["prose"] * 5}, with_experts=False), once)
    torch.testing.assert_close(weight, lmoe_layers(model)["model.layers.1.self_attn.q_proj"].router.gate_weight)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("router", "reads"), [("layer", "token"), ("block", "prefix"), ("group", "prefix")])
def test_padding_does_not_count(router: Any, reads: Any, side: str) -> None:
    model, texts = mixture(llama(), router=router, router_reads=reads), domains()
    alone = fit_router(model, texts, with_experts=False)
    gates = {name: p.detach().clone() for name, p in model.named_parameters() if "gate" in name}

    def padded(ids: Tensor) -> dict[str, Tensor]:
        pads = torch.randint(0, 32, (3, 4))
        parts = [(pads, torch.zeros_like(pads)), (ids, torch.ones_like(ids))]
        ids, mask = (torch.cat(one, dim=1) for one in zip(*(parts if side == "left" else parts[::-1]), strict=True))
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    again = fit_router(
        model, {name: [padded(ids) for ids in batches] for name, batches in texts.items()}, with_experts=False
    )
    same_fits(again, alone)
    for name, gate in gates.items():
        torch.testing.assert_close(model.get_parameter(name), gate)


def test_gates_of_the_peft_tuner() -> None:
    plain = mixture(llama(), gate_bias=True)
    config = LMoEConfig(
        num_experts=3, r=2, expert_names=NAMES, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], gate_bias=True
    )
    inner = llama()
    inner.load_state_dict({k.replace(".frozen_layer", ""): v for k, v in plain.state_dict().items()}, strict=False)
    model = get_peft_model(inner, config)
    for layer in layers_with_experts(model).values():
        nn.init.normal_(layer.mixtures()["default"].tensors["lora_b"])
    texts, trained = domains(), [p.requires_grad for p in model.parameters()]
    of_plain = fit_router(plain, texts, with_experts=False)
    for name, fit in fit_router(model, texts, with_experts=False).items():
        tensors = layers_with_experts(model)[name].mixtures()["default"].tensors
        assert fit == pytest.approx(of_plain[name])
        torch.testing.assert_close(tensors["gate_weight"], lmoe_layers(plain)[name].gate_weight)
        torch.testing.assert_close(tensors["gate_bias"], lmoe_layers(plain)[name].gate_bias)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not any(layer.disable_adapters for layer in model.modules() if isinstance(layer, LMoETunerLinear))


def test_several_readings_give_the_same_with_less_memory() -> None:
    model, calls = mixture(llama()), []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(0))
    texts = domains()
    at_once = fit_router(model, texts, with_experts=False)
    few = len(calls)
    same_fits(fit_router(model, texts, memory=3 * 16 * 16**2, with_experts=False), at_once)
    handle.remove()
    assert len(calls) - few == (4 + 1) * few / 2


def test_generators_half_precision_and_compiled_code() -> None:
    model = mixture(llama().bfloat16(), router="block", router_reads="prefix")
    texts = domains()
    first = fit_router(model, {name: iter(batches) for name, batches in texts.items()}, with_experts=False)
    model.model.layers[0].compile(backend="eager")
    model.model.layers[1].compile(backend="eager")
    model(IDS, use_cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same_fits(fit_router(model, texts, with_experts=False), first)
    model(IDS, use_cache=False)


def test_leaves_nothing_behind() -> None:
    model = mixture(llama(), router="block", router_reads="prefix", dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    lmoe_layers(model)["model.layers.1.self_attn.k_proj"].disabled = True
    before, modes = state(model), [module.training for module in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    rest = {name: p.detach().clone() for name, p in model.named_parameters() if "gate" not in name}
    texts, generator = domains(), torch.get_rng_state()
    fit_router(model, texts)
    assert torch.equal(torch.get_rng_state(), generator)
    assert state(model) == before
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert [layer.disabled for layer in lmoe_layers(model).values()] == [i == 5 for i in range(8)]
    assert all(layer.router is None or layer.router.router_logits is None for layer in lmoe_layers(model).values())
    assert all(one is two for one, two in zip(gates, [p for n, p in model.named_parameters() if "gate" in n], strict=True))
    for name, parameter in rest.items():
        assert torch.equal(model.get_parameter(name), parameter)


def test_wrong_arguments_and_models_are_refused() -> None:
    model, texts = mixture(llama(), router="block"), domains()
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def refused(error: str, given: Any = texts, kind: type[Exception] = ValueError, on: nn.Module = model, **options: Any):
        with pytest.raises(kind, match=error) as caught:
            fit_router(on, given, **options)
        assert "\n" not in str(caught.value)

    first = "model.layers.0.self_attn.q_proj"
    refused(
        rf"domains must have the names of experts, got 'cod', which '{first}' does not have; nearest: 'code'", {"cod": []}
    )
    refused(rf"domains must have one for each expert, got none for 'lists' of '{first}'", {"code": [], "prose": []})
    refused(r"domains\['code'\] must have tokens that the gate of '.*q_proj' reads, got none", {**texts, "code": []})
    nothing = {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}
    refused(r"domains\['prose'\] must have tokens that the gate of '.*' reads, got none", {**texts, "prose": [nothing]})
    refused(r"domains must be a dict of batches by the names of experts, got list", [], TypeError)
    refused(r"domains\['prose'\] must be several batches, got Tensor", {**texts, "prose": IDS}, TypeError)
    refused(r"domains\['prose'\] must be several batches, got dict", {**texts, "prose": {}}, TypeError)
    refused(
        r"domains\['prose'\] must hold tensors of token ids, or dicts of .*, got str", {**texts, "prose": ["a"]}, TypeError
    )
    refused(r"ridge must be a number above 0, got 0", ridge=0)
    refused(r"ridge must be a number above 0, got -1", ridge=-1)
    refused(r"sharpness must be None or a finite number, got inf", sharpness=float("inf"))
    refused(r"with_experts must be a bool, got int", kind=TypeError, with_experts=1)
    refused(r"memory must be at least 1, got 0", memory=0)
    refused(r"model must be a torch.nn.Module, got int", kind=TypeError, on=1)
    refused(r"model must have L-MoE layers with gates \(see apply_lmoe\), got none", on=llama())
    refused(r"model must have data, got layer '.*' on the meta device", on=copy.deepcopy(model).to("meta"))
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.model.layers[0].self_attn.o_proj.weight, torch.nan)
    refused(r"domains must give finite inputs of 'model.layers.1.self_attn.q_proj', got NaN or infinity", on=broken)
    with pytest.raises(IndexError):  # an error of the model itself
        fit_router(model, {**texts, "lists": [torch.tensor([[32]])]})
    assert all(module.training for module in model.modules())
    for name, parameter in before.items():
        assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed package")
def test_distributed_models_are_refused() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mixture(llama()))
        with pytest.raises(
            ValueError, match="fit_router: model must not be distributed, got one in DistributedDataParallel"
        ):
            fit_router(model, domains())
    finally:
        distributed.destroy_process_group()
