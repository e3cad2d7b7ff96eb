# SPDX-License-Identifier: Apache-2.0
"""What the layers with experts share: the forward around a frozen layer, and access to the experts of a layer.

`LMoELinear` has one mixture of experts. The layer of the PEFT tuner has one for each adapter.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmoe_kernels.config import LayerConfig
from lmoe_kernels.functional import lmoe, lmoe_linear
from lmoe_kernels.gate import router_logits
from lmoe_kernels.linears import is_plain_linear

GATE = ("gate_weight", "gate_bias")


class Mixture(NamedTuple):
    """The experts and the gate of a layer: their options, and their tensors by the names of `LayerConfig.shapes`."""

    config: LayerConfig
    tensors: dict[str, Tensor]  # parameters, except choice_bias, a buffer


def initialise(mixture: Mixture) -> None:
    """Initialise A like PEFT (Kaiming uniform over I, a = sqrt(5)), the gate's weight normal, everything else zero."""
    tensors = dict(mixture.tensors)
    lora_a, gate_weight = tensors.pop("lora_a"), tensors.pop("gate_weight", None)
    in_features, std = lora_a.shape[2], mixture.config.gate_init_std
    bound = in_features**-0.5 if in_features else 0.0
    nn.init.uniform_(lora_a, -bound, bound)
    for tensor in tensors.values():
        nn.init.zeros_(tensor)
    if gate_weight is not None:
        nn.init.normal_(gate_weight, std=bound if std is None else std)


class LayerWithExperts(ABC):
    """The interface of layers with experts, for code that works on the layers of both kinds."""

    @abstractmethod
    def wrapped(self) -> nn.Module:
        """The frozen layer to whose output the experts add."""

    @abstractmethod
    def active(self) -> list[str]:
        """The names of the adapters that forward adds, in their order."""

    @abstractmethod
    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures of the layer by the names of their adapters."""

    def gate(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of an adapter's gate by the names of `LayerConfig.shapes`, also where several layers share it."""
        return {key: tensor for key, tensor in self.mixtures()[adapter].tensors.items() if key in GATE}

    @abstractmethod
    def set_mixture(self, adapter: str, mixture: Mixture) -> None:
        """Replace the options and the tensors of an adapter, whose numbers of experts may change."""

    @abstractmethod
    def keep_router_logits(self, adapter: str, keep: bool) -> None:
        """Set the option output_router_logits of an adapter. Without it, the logits of the last forward are dropped."""

    @abstractmethod
    def kept_router_logits(self) -> dict[str, Tensor]:
        """The router logits (..., E) of the last forward, by adapter, of those that keep them."""

    @abstractmethod
    def loads(self) -> dict[str, Tensor]:
        """The buffers `Choice.load`, by adapter, of those that have a choice_bias."""


class Choice(NamedTuple):
    """How the experts of `top_k` are chosen if a bias that no gradient trains takes part, and how often each was chosen."""

    bias: Tensor  # (E), fp32, added to the logits for the choice alone
    load: Tensor | None  # (E), fp32, counts the tokens that chose each expert; None outside training


def add_experts(
    base: nn.Module | Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    options: dict[str, Any],
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add the delta of the experts to a frozen layer, or to its output.

    Args:
        base: the frozen layer, which is called unless its product can be computed together with the delta; or a tensor
            (..., O), to which the delta is added.
        x: (..., I), see `lmoe`.
        lora_a: (E, R, I), see `lmoe`.
        lora_b: (E, R, O), see `lmoe`.
        options: the other keywords of `lmoe`.
        choice: see `Choice`; only with top_k, renormalize and gate_weight.

    Returns:
        y (..., O), and the router logits (..., E) if the options ask for them, else None.
    """
    logits = None
    if choice is not None:
        logits = router_logits(x, options["gate_weight"], options["gate_bias"])
        chosen = of_chosen(logits, options["top_k"], choice)
        options = {**options, "gate_weight": None, "gate_bias": None, "gate_logits": chosen}
    if isinstance(base, nn.Module) and is_plain_linear(base):
        result = lmoe_linear(x, base.weight, base.bias, lora_a, lora_b, **options)
    else:
        result = lmoe(x, lora_a, lora_b, base=base if isinstance(base, Tensor) else base(x), **options)
    if not isinstance(result, tuple):
        return result, None
    y, of_result = result
    return y, of_result if logits is None else logits


def of_chosen(logits: Tensor, top_k: int, choice: Choice) -> Tensor:
    """The router logits of the experts with the top_k largest sums of logit and bias; -inf for the others.

    Of equal sums, the expert with the lower index is chosen, as in `lmoe`. `torch.topk` chooses any of them.
    """
    best = (logits.detach() + choice.bias).argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
    if choice.load is not None:
        choice.load.add_(chosen.reshape(-1, chosen.shape[-1]).sum(dim=0))
    return logits.masked_fill(~chosen, float("-inf"))
