"""One LoRA, a mixture that is trained at once, and a mixture of LoRAs that were trained apart, on copies of a model."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lmoe_kernels as lk
from lmoe_kernels.options import Mixing

Experts = dict[str, Tensor]  # the trained parameters of one LoRA, by their names in the model


def one_lora(base: nn.Module, rank: int, scaling: float, seed: int) -> nn.Module:
    """A copy of the model with one LoRA on every linear layer: an L-MoE layer with one expert, whose gate is always 1."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    lk.apply_lmoe(model, "all-linear", num_experts=1, rank=rank, alpha=scaling * rank)
    lk.freeze_gates(model)
    return model


def mixture(
    base: nn.Module, mixing: Mixing, scaling: float, seed: int, num_experts: int = 8, rank: int = 4, **options: Any
) -> nn.Module:
    """A copy of the model with a mixture of new experts on every linear layer."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    lk.apply_lmoe(
        model, "all-linear", num_experts=num_experts, rank=rank, alpha=scaling * rank, mixing=mixing,
        output_router_logits=True, **options,
    )  # fmt: skip
    return model


def experts_of(model: nn.Module) -> Experts:
    """The factors of the LoRA of a model."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def composed(base: nn.Module, loras: Mapping[str, Experts], scaling: float, **routing: Any) -> nn.Module:
    """A copy of the model whose experts are these LoRAs of equal rank, frozen. All gates are equal: the LoRAs are averaged.

    Args:
        base: the model that the LoRAs were trained for.
        loras: what `experts_of` returned for each of them, by the names of the experts.
        scaling: the one that they were trained with.
        routing: the options of `apply_lmoe` on routers.
    """
    model = copy.deepcopy(base)
    first, *_ = loras.values()
    rank = next(tensor.shape[1] for name, tensor in first.items() if name.endswith("lora_a"))
    lk.apply_lmoe(
        model, "all-linear", num_experts=len(loras), rank=rank, alpha=scaling * rank, mixing="outputs",
        expert_names=list(loras), gate_init_std=0.0, output_router_logits=True, **routing,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in first:
            parameter.data.copy_(torch.cat([lora[name] for lora in loras.values()]))
            parameter.requires_grad_(False)
    return model
