"""Statistics of router logits, computed one token after another, with which those of `RoutingStats` are compared."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lmoe_kernels import collect_router_logits, lmoe_layers
from tests.models import llama, with_experts

NAMES = ["tokens", "mean_gate", "load", "entropy_bits", "experts_per_token", "effective_experts"]


def ids(rows: int = 3, columns: int = 9) -> Tensor:
    return torch.randint(1, 32, (rows, columns))


def mixture(**options: Any) -> LlamaForCausalLM:
    return with_experts(llama(), **{"gate_init_std": 2.0, **options})


def collected(model: nn.Module, *args: Any, **keywords: Any) -> dict[str, Tensor]:
    """The router logits of a forward, from layers that keep them."""
    before = [layer.output_router_logits for layer in lmoe_layers(model).values()]
    for layer in lmoe_layers(model).values():
        layer.output_router_logits = True
    with torch.no_grad():
        model(*args, **keywords)
        logits = {name: t.clone() for name, t in collect_router_logits(model).items()}
    for layer, kept in zip(lmoe_layers(model).values(), before, strict=True):
        layer.output_router_logits, layer.router_logits = kept, None
    return logits


def expected(logits: Tensor, top_k: int | None = None, bias: Tensor | None = None) -> dict[str, Any]:
    """The statistics of tokens (T, E), one token after another, in Python's floats."""
    experts = logits.shape[1]
    kept = top_k or experts
    gates, load, entropy = [0.0] * experts, [0.0] * experts, 0.0
    for token in logits.double():
        ranked = token if bias is None else token + bias
        order = sorted(range(experts), key=lambda e: -ranked[e].item())
        powers = {e: math.exp(token[e].item()) for e in order[:kept]}
        for e, power in powers.items():
            gate = power / sum(powers.values())
            gates[e] += gate / len(logits)
            entropy -= gate * math.log2(gate) / len(logits)
        for e in order[: top_k or 1]:
            load[e] += 1 / len(logits)
    effective = 2 ** -sum(gate * math.log2(gate) for gate in gates if gate > 0)
    values = [len(logits), gates, load, entropy, 2**entropy, effective]
    return dict(zip(NAMES, values, strict=True))


def assert_same(found: dict[str, Any], wanted: dict[str, Any], rtol: float = 1e-9) -> None:
    for name in NAMES:
        torch.testing.assert_close(
            torch.tensor(found[name], dtype=torch.float64),
            torch.tensor(wanted[name], dtype=torch.float64),
            rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def masked(batch: Tensor) -> Tensor:
    mask = torch.ones_like(batch)
    mask[0, :4], mask[1, :1] = 0, 0
    return mask


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules()]
