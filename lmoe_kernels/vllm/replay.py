# SPDX-License-Identifier: Apache-2.0
"""A model in training uses the experts that the tokens of a rollout used. Needs no vLLM."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.mixture import Choice, add_experts
from lmoe_kernels.targets import lmoe_layers

_OP = "replay_routing"
_FAR = 1e30  # above all logits, and finite, so that the sum with a logit is


@contextmanager
def replay_routing(model: nn.Module, rollout: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
    """Let the layers with `top_k` choose, in a `with` block, the experts that the tokens of a rollout had.

    Rounding can change which experts are the best k of a token, for example between the kernels of vLLM and those of
    training. The policy whose log-probabilities are compared then computes another function. With replay the experts are
    those of the rollout, and the gates are the softmax of the training's own logits of these experts, with gradients.
    Layers without `top_k` use all experts, so that nothing is replayed there. With activation checkpointing, the backward
    belongs in the block, too: it repeats the forward.

    Args:
        model: a model with L-MoE layers, which is called with batches of the shape (sequences, tokens).
        rollout: for each sequence of the batch the logits (tokens, E) by the name of the layer, as `Routing.of` returns
            them. They are those of the sequence's first tokens; later ones, such as padding on the right, choose by their
            own logits.

    Raises:
        ValueError: a layer is missing in the rollout or has another number of experts; a layer with top_k shares a router
            or does not renormalise its gates; in forward, the batch has another shape.

    Example:
        with replay_routing(model, [routing.of(output)[0] for output in outputs]):
            loss = policy_loss(model(batch).logits, ...)

    Source: L-MoE, arXiv 2510.17898.
    """
    layers = {name: layer for name, layer in lmoe_layers(model).items() if layer.top_k is not None}
    chosen = {name: _chosen(name, layer, rollout) for name, layer in layers.items()}
    for name, layer in layers.items():
        vars(layer)["forward"] = _forward(layer, chosen[name])
    try:
        yield
    finally:
        for layer in layers.values():
            del vars(layer)["forward"]


def _chosen(name: str, layer: LMoELinear, rollout: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The numbers (tokens, top_k) of the experts of each sequence."""
    if layer.gate_weight is None or not layer.renormalize:
        got = "a shared router" if layer.gate_weight is None else "renormalize=False"
        _fail(f"layer {name!r}", "have a gate of its own and renormalised gates", got)
    chosen = []
    for logits in rollout:
        if name not in logits:
            _fail("rollout", f"hold the logits of layer {name!r}", "none of that name")
        if logits[name].dim() != 2 or logits[name].shape[1] != layer.num_experts:
            _fail(f"logits of layer {name!r}", f"have shape (tokens, {layer.num_experts})", tuple(logits[name].shape))
        of_choice = logits[name] if layer.choice_bias is None else logits[name] + layer.choice_bias.to(logits[name].device)
        # Of equal logits, the expert with the lower number is chosen, as in `lmoe`.
        chosen.append(of_choice.argsort(dim=1, descending=True, stable=True)[:, : layer.top_k])
    return chosen


def _forward(layer: LMoELinear, chosen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        longest = max((len(experts) for experts in chosen), default=0)
        if x.dim() != 3 or len(x) != len(chosen) or x.shape[1] < longest:
            _fail("model", f"be called with {len(chosen)} sequences of {longest} tokens or more", tuple(x.shape[:-1]))
        bias = torch.zeros(*x.shape[:-1], layer.num_experts, device=x.device)
        for row, experts in zip(bias, chosen, strict=True):
            row[: len(experts)].scatter_(1, experts.to(x.device), _FAR)
        load = layer.load if layer.training else None
        options: dict[str, Any] = {
            "gate_weight": layer.gate_weight,
            "gate_bias": layer.gate_bias,
            "scaling": layer.scaling,
            "mixing": layer.mixing,
            "top_k": layer.top_k,
            "renormalize": layer.renormalize,
            "dropout": layer.dropout if layer.training else 0.0,
            "backend": layer.backend,
            "return_router_logits": layer.output_router_logits,
        }
        if layer.choice_bias is not None:
            bias = bias + layer.choice_bias
        y, layer.router_logits = add_experts(layer.frozen_layer, x, layer.lora_a, layer.lora_b, options, Choice(bias, load))
        return y

    return forward


def _fail(argument: str, must: str, got: object) -> NoReturn:
    checks.fail(_OP, argument, must, got)
