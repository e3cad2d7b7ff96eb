"""Routers that several layers share: what they compute, what they train, and what they refuse."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmoe_kernels import LMoELinear, apply_lmoe, collect_router_logits, disable_lmoe, lmoe_layers, remove_lmoe
from tests.models import IDS, llama

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
SCOPES, READS = ("layer", "group", "block", "model"), ("token", "prefix")
ROUTERS = [(scope, reads) for scope in SCOPES for reads in READS if (scope, reads) != ("layer", "token")]
MASK = torch.ones_like(IDS)
MASK[0, 7:] = 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q_proj(x).tanh() * self.k_proj(x) + self.v_proj(x)


class Model(nn.Module):
    """A model without fp32 in it, for differences, and without a limit of its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def routed(scope: str, reads: str, **options: Any) -> nn.Module:
    """A model with random experts."""
    model = llama()
    apply_lmoe(model, TARGETS, num_experts=3, rank=2, router=scope, router_reads=reads, gate_bias=True, **options)
    for name, parameter in model.named_parameters():
        if "lora_b" in name or "gate_bias" in name:
            nn.init.normal_(parameter)
    return model


def routers(model: nn.Module) -> list[Any]:
    return [layer.router for layer in lmoe_layers(model).values() if layer.router is not None]


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """The inputs of all layers and of the blocks in one forward, by name."""
    seen: dict[str, Tensor] = {}
    watched = {name: m for name, m in model.named_modules() if isinstance(m, LMoELinear) or name in BLOCKS}
    hooks = [m.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]})) for name, m in watched.items()]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return seen


BLOCKS = ("model.layers.0", "model.layers.1")


def plain_logits(router: Any, x: Tensor, reads: str, normalise: bool) -> Tensor:
    if reads == "prefix":
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    if normalise or reads == "prefix":
        x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    return x @ router.gate_weight.T + router.gate_bias


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_the_logits_and_the_outputs_are_those_of_plain_pytorch(scope: str, reads: str) -> None:
    model = routed(scope, reads, output_router_logits=True)
    seen, found = inputs(model), collect_router_logits(model)
    assert len(routers(model)) == {"layer": 8, "group": 4, "block": 2, "model": 1}[scope]
    for name, layer in lmoe_layers(model).items():
        block = BLOCKS[0] if scope == "model" else name[: len(BLOCKS[0])]
        x = seen[block] if scope in ("block", "model") else seen[name]
        true = plain_logits(layer.shared_router(), x, reads, scope in ("block", "model"))
        torch.testing.assert_close(found[name], true, rtol=1e-9, atol=1e-9)
        if scope in ("layer", "group"):
            gates = true.softmax(-1)
            a, b = (torch.einsum("bse,eri->bsri", gates, t) for t in (layer.lora_a, layer.lora_b))
            delta = torch.einsum("bsro,bsr->bso", b, torch.einsum("bsri,bsi->bsr", a, seen[name]))
            torch.testing.assert_close(
                layer(seen[name]), layer.frozen_layer(seen[name]) + layer.scaling * delta, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_gradients_agree_with_differences(scope: str, reads: str) -> None:
    """Along a random direction of all trained parameters."""
    model, x = Model().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    apply_lmoe(model, "all-linear", num_experts=3, rank=2, router=scope, router_reads=reads)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)
    directions = [torch.randn_like(p) for p in parameters]

    def loss() -> Tensor:
        return model(x).tanh().sum()

    loss().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters)
    found = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            values.append(loss())
    torch.testing.assert_close(found, (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_a_model_in_bf16_under_autocast(scope: str, reads: str) -> None:
    """The logits stay in fp32, and so do the gradients of the router."""
    model = routed(scope, reads, output_router_logits=True, dtype=torch.float32).to(torch.bfloat16)
    for part in [*lmoe_layers(model).values(), *routers(model)]:
        for key, parameter in part.named_parameters(recurse=False):
            setattr(part, key, nn.Parameter(parameter.float()))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    assert {logits.dtype for logits in collect_router_logits(model).values()} == {torch.float32}
    assert all(router.gate_weight.grad.dtype == torch.float32 for router in routers(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_activation_checkpointing_gives_the_same_gradients(scope: str, reads: str) -> None:
    """Two forwards, of other tokens and padding, come before their backward: each block must get what it got before."""
    model = routed(scope, reads).train()
    batches = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(0)}]

    def backward() -> dict[str, Tensor]:
        model.zero_grad()
        first, second = (logits_of(model, batch) for batch in batches)
        (first.square().mean() + second.square().mean()).backward()
        return gradients(model)

    true = backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = backward()
    assert found.keys() == true.keys()
    for name, gradient in true.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_reentrant_checkpointing_is_equal_or_an_error(scope: str, reads: str) -> None:
    """It repeats a block with another tensor as its input, and needs logits with a graph."""
    model = routed(scope, reads).train()
    embeddings = model.model.embed_tokens(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    true = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if scope in ("block", "model"):
        with pytest.raises(ValueError, match=r"use_reentrant=False"):
            model(inputs_embeds=embeddings).logits.square().mean().backward()
        return
    loss = model(inputs_embeds=embeddings).logits.square().mean()
    loss.backward()
    for name, gradient in true.items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("scope", "reads"), [("group", "token"), ("block", "token"), ("model", "prefix")])
def test_compiled_without_a_cache(scope: str, reads: str) -> None:
    """Routers of tokens break no graph."""
    model = routed(scope, reads)
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=reads == "token")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
def test_a_copy_has_routers_of_its_own(scope: str, reads: str) -> None:
    model = routed(scope, reads)
    expected = model(IDS).logits
    expected.sum().backward()  # logits with a graph cannot be copied
    copied = copy.deepcopy(model)
    for router in routers(model):
        nn.init.normal_(router.gate_weight)
    assert torch.equal(copied(IDS).logits, expected)
    assert not torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(("scope", "reads"), ROUTERS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (2, 0)])
def test_few_tokens(scope: str, reads: str, shape: tuple[int, int]) -> None:
    model = Model()
    apply_lmoe(model, "all-linear", num_experts=2, rank=2, router=scope, router_reads=reads)
    y = model(torch.randn(*shape, 6))
    assert y.shape == (*shape, 6)
    assert y.isfinite().all()
    y.sum().backward()


def group() -> tuple[nn.ModuleDict, list[Tensor]]:
    """The layers of a group, and the inputs that their router has computed logits for."""
    layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    model = nn.ModuleDict({"attention": layers})
    apply_lmoe(model, "all-linear", num_experts=2, rank=1, router="group", output_router_logits=True)
    computed: list[Tensor] = []
    routers(model)[0].register_forward_pre_hook(lambda _, args: computed.append(args[0]))
    return layers, computed


def test_a_group_computes_the_logits_of_an_input_once() -> None:
    model, computed = group()
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    for layer in model.values():
        layer(x)
    assert len(computed) == 1
    assert len({id(layer.router_logits) for layer in model.values()}) == 1
    for name in model:
        model[name](other if name == "k_proj" else x)
    assert len(computed) == 4
    x = torch.randn(3, 4)
    for layer in model.values():
        layer(x)
        x.add_(1)
    assert len(computed) == 7


def test_a_group_does_not_use_logits_of_older_parameters() -> None:
    """Here the third layer of the group does not run, so the logits are left over."""
    model, computed = group()
    x = torch.randn(3, 4)
    with torch.no_grad():
        model["q_proj"](x), model["k_proj"](x)
    model["q_proj"](x)
    assert model["q_proj"].router_logits.requires_grad
    model["k_proj"](x)
    nn.init.normal_(routers(model)[0].gate_weight)
    model["v_proj"](x)
    assert len(computed) == 3


def test_inference_mode() -> None:
    """Its tensors have no version, and a mean must not add its tokens to a cache twice."""
    for scope, reads in ROUTERS:
        model = routed(scope, reads)
        expected = model(IDS).logits
        with torch.inference_mode():
            assert torch.equal(model(IDS).logits, expected), (scope, reads)


def test_disabled_layers_read_no_block() -> None:
    model = routed("block", "token")
    calls: list[int] = []
    for router in routers(model):
        router.register_forward_hook(lambda *_: calls.append(1))
    with disable_lmoe(model):
        model(IDS)
    assert not calls
    model(IDS)
    assert len(calls) == 2


def test_a_later_call_joins_the_router() -> None:
    """It moves to the layer that is first now."""
    model = llama()
    apply_lmoe(model, "v_proj", num_experts=3, rank=2, router="block", router_reads="prefix")
    before = routers(model)
    apply_lmoe(model, "q_proj", num_experts=3, rank=4, router="block", router_reads="prefix")
    assert [id(router) for router in routers(model)] == [id(router) for router in before]
    assert [name for name, p in model.named_parameters() if name.endswith("router.gate_weight")] == [
        f"{block}.self_attn.q_proj.router.gate_weight" for block in BLOCKS
    ]
    model(IDS)
    names, config = [name for name, _ in model.named_parameters()], lmoe_layers(model)
    with pytest.raises(
        ValueError, match=r"^apply_lmoe: \S+k_proj must have num_experts=3 like \S+q_proj', with which it sha"
    ):
        apply_lmoe(model, "k_proj", num_experts=2, rank=2, router="block", router_reads="prefix")
    assert [name for name, _ in model.named_parameters()] == names
    assert lmoe_layers(model) == config


def test_remove_takes_the_hooks_away() -> None:
    model = llama()
    expected = model(IDS).logits
    apply_lmoe(model, TARGETS, num_experts=3, rank=2, router="model", router_reads="prefix")
    assert model.model.layers[0]._forward_pre_hooks
    remove_lmoe(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(IDS).logits, expected)
