"""A layer with the experts of two adapters, as the tuner of PEFT has them, in as few lines as the interface allows."""

from typing import Any

import torch
from torch import Tensor, nn

from lmoe_kernels.config import LayerConfig
from lmoe_kernels.mixture import Choice, LayerWithExperts, Mixture, add_experts


class TwoAdapters(nn.Module, LayerWithExperts):
    """A linear layer with the adapters "first" and "second", of which some are active."""

    def __init__(self, base: nn.Linear, active: tuple[str, ...] = ("first", "second"), **options: Any) -> None:
        super().__init__()
        self.base, self._active = base.requires_grad_(False), active
        self._configs = {
            "first": LayerConfig(num_experts=3, rank=2, expert_names=["law", "code", "news"], **options),
            "second": LayerConfig(num_experts=4, rank=2, **options),
        }
        self._logits: dict[str, Tensor] = {}
        self._loads: dict[str, Tensor] = {}
        for adapter, config in self._configs.items():
            shapes = config.shapes(base.in_features, base.out_features)
            self.add_module(adapter, nn.ParameterDict({k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}))
            if config.choice_bias:
                self._loads[adapter] = torch.zeros(config.num_experts)
                nn.init.zeros_(self.get_submodule(adapter)["choice_bias"].requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        self._logits, y = {}, self.base
        for adapter in self._active:
            (config, tensors), load = self.mixtures()[adapter], self._loads.get(adapter)
            bias = tensors.pop("choice_bias", None)
            choice = None if bias is None else Choice(bias, load if self.training else None)
            options = {"gate_weight": tensors["gate_weight"], "gate_bias": None, "top_k": config.top_k}
            options["return_router_logits"] = config.output_router_logits
            y, logits = add_experts(y, x, tensors["lora_a"], tensors["lora_b"], options, choice)
            self._logits |= {} if logits is None else {adapter: logits}
        return y

    def wrapped(self) -> nn.Module:
        return self.base

    def active(self) -> list[str]:
        return list(self._active)

    def mixtures(self) -> dict[str, Mixture]:
        return {name: Mixture(config, dict(self.get_submodule(name).items())) for name, config in self._configs.items()}

    def set_mixture(self, adapter: str, mixture: Mixture) -> None:
        self._configs[adapter] = mixture.config
        self.get_submodule(adapter).update(mixture.tensors)

    def keep_router_logits(self, adapter: str, keep: bool) -> None:
        self._configs[adapter] = self._configs[adapter]._replace(output_router_logits=keep)

    def kept_router_logits(self) -> dict[str, Tensor]:
        return self._logits

    def loads(self) -> dict[str, Tensor]:
        return self._loads
