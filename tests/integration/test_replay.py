"""Replay of a rollout's choice of experts in training, without vLLM."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lmoe_kernels import lmoe_layers
from lmoe_kernels.vllm import replay_routing
from tests.models import IDS, llama, with_experts


def recorded(model: Any, tokens: int, ids: Tensor = IDS) -> list[dict[str, Tensor]]:
    """The logits of a forward, of the first tokens of each sequence."""
    for layer in lmoe_layers(model).values():
        layer.output_router_logits = True
    with torch.no_grad():
        model(ids)
    logits = {name: layer.router_logits for name, layer in lmoe_layers(model).items()}
    return [{name: of_layer[i, :tokens].float() for name, of_layer in logits.items()} for i in range(len(ids))]


def with_other_gates(model: Any) -> None:
    with torch.no_grad():
        for layer in lmoe_layers(model).values():
            layer.gate_weight.normal_(std=2.0)


@pytest.mark.parametrize(
    "options", [{"top_k": 2}, {"top_k": 2, "choice_bias": True}, {"top_k": 1, "gate_bias": True}], ids=str
)
@pytest.mark.filterwarnings("ignore:LMoELinear. top_k=1")
def test_replay_of_the_own_choice_changes_nothing(options: dict[str, Any]) -> None:
    model = with_experts(llama(), **options)
    for layer in lmoe_layers(model).values():
        if layer.choice_bias is not None:
            layer.choice_bias.normal_()
    expected = model(IDS).logits
    with replay_routing(model, recorded(model, IDS.shape[1])):
        torch.testing.assert_close(model(IDS).logits, expected)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_the_experts_are_those_of_the_rollout_and_the_gates_those_of_training() -> None:
    model = with_experts(llama(), top_k=2)
    of_rollout = recorded(model, IDS.shape[1])
    with_other_gates(model)
    own = model(IDS).logits
    seen: dict[str, Tensor] = {}
    names = {layer: name for name, layer in lmoe_layers(model).items()}

    def check(layer: Any, args: tuple[Tensor], y: Tensor) -> None:
        [x], name = args, names[layer]
        best = torch.stack([logits[name] for logits in of_rollout]).topk(2).indices
        mask = torch.full((*x.shape[:-1], layer.num_experts), float("-inf"), dtype=x.dtype).scatter(-1, best, 0.0)
        gates = (x @ layer.gate_weight.to(x.dtype).T + mask).softmax(-1)
        a, b = (torch.einsum("bte,erf->btrf", gates, t.to(x.dtype)) for t in (layer.lora_a, layer.lora_b))
        delta = torch.einsum("btro,btr->bto", b, torch.einsum("btri,bti->btr", a, x))
        seen[name] = y - layer.frozen_layer(x) - layer.scaling * delta

    hooks = [layer.register_forward_hook(check) for layer in names]
    with replay_routing(model, of_rollout):
        replayed = model(IDS).logits
    for hook in hooks:
        hook.remove()
    assert seen.keys() == set(names.values())
    for difference in seen.values():
        torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-9)
    assert (replayed - own).abs().max() > 1e-3


def test_gates_and_experts_get_gradients_under_replay() -> None:
    model = with_experts(llama(), top_k=2)
    of_rollout = recorded(model, IDS.shape[1])
    with_other_gates(model)
    with replay_routing(model, of_rollout):
        model(IDS).logits.square().sum().backward()
    for layer in lmoe_layers(model).values():
        for parameter in (layer.lora_a, layer.lora_b, layer.gate_weight):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0


def test_later_tokens_choose_by_their_own_logits() -> None:
    model = with_experts(llama(), top_k=2)
    of_rollout = recorded(model, 5)
    padded = torch.cat([IDS[:, :5], torch.randint(0, 32, (2, 7))], dim=1)
    expected = model(padded).logits
    with replay_routing(model, of_rollout):
        torch.testing.assert_close(model(padded).logits, expected)


def test_layers_without_top_k_are_left_alone() -> None:
    model = with_experts(llama())
    expected = model(IDS).logits
    with replay_routing(model, []):
        assert torch.equal(model(IDS).logits, expected)


def _without(rollout: list[dict[str, Tensor]], name: str) -> list[dict[str, Tensor]]:
    return [{key: logits for key, logits in one.items() if key != name} for one in rollout]


def test_what_does_not_fit_is_one_line_and_changes_nothing() -> None:
    model = with_experts(llama(), top_k=2)
    expected, of_rollout = model(IDS).logits, recorded(model, 12)
    name = next(iter(lmoe_layers(model)))
    wide = [{**one, name: torch.zeros(12, 4)} for one in of_rollout]
    for rollout, reason in (
        (_without(of_rollout, name), f"rollout must hold the logits of layer '{name}'"),
        (wide, f"logits of layer '{name}' must have shape \\(tokens, 3\\), got \\(12, 4\\)"),
    ):
        with pytest.raises(ValueError, match=f"^replay_routing: {reason}"), replay_routing(model, rollout):
            pass
        assert torch.equal(model(IDS).logits, expected)
    for rollout in (of_rollout[:1], [*of_rollout[:1], {key: t.repeat(2, 1) for key, t in of_rollout[1].items()}]):
        with pytest.raises(ValueError, match="model must be called with"), replay_routing(model, rollout):
            model(IDS)
        assert torch.equal(model(IDS).logits, expected)
    for options, reason in (({"renormalize": False}, "renormalize=False"), ({"router": "group"}, "a shared router")):
        other = with_experts(llama(), top_k=2, **options)
        with pytest.raises(ValueError, match=f"got {reason}"), replay_routing(other, recorded(other, 12)):
            pass
