# SPDX-License-Identifier: Apache-2.0
"""The options of a layer as its attributes, which may be changed between two forwards."""

from typing import Any

from lmoe_kernels.config import LayerConfig
from lmoe_kernels.options import Mixing

# The names of these options are those of tensors and modules of the layer.
_ATTRIBUTES = {"gate_bias": "has_gate_bias", "choice_bias": "has_choice_bias", "router": "router_scope"}


class WithOptions:
    """What `LMoELinear` has of its options."""

    in_features: int
    out_features: int

    def _set_options(self, config: LayerConfig) -> None:
        assert config.alpha is not None
        self.num_experts, self.rank = config.num_experts, config.rank
        self.alpha, self.scaling = config.alpha, config.alpha / config.rank
        self.mixing: Mixing = config.mixing
        self.top_k, self.renormalize = config.top_k, config.renormalize
        self.shared_a, self.has_gate_bias, self.gate_init_std = config.shared_a, config.gate_bias, config.gate_init_std
        self.has_choice_bias, self.expert_names, self.dropout = config.choice_bias, config.names(), config.dropout
        self.router_scope, self.router_reads = config.router, config.router_reads
        self.output_router_logits, self.backend = config.output_router_logits, config.backend

    def options(self) -> LayerConfig:
        """All options of the layer."""
        options = LayerConfig(**{name: getattr(self, _ATTRIBUTES.get(name, name)) for name in LayerConfig._fields})
        unnamed = options._replace(expert_names=None)
        return unnamed if options.expert_names == unnamed.names() else options

    def config(self) -> dict[str, Any]:
        """The options that decide what the layer computes, by name. A checkpoint stores these."""
        options = self.options()
        return {**options.stored(), "expert_names": None if options.expert_names is None else list(options.expert_names)}

    def extra_repr(self) -> str:
        """The sizes and options for `print(model)`, without those that have their defaults."""
        options, default = self.options(), LayerConfig()
        others = ("top_k", "renormalize", "shared_a", "gate_bias", "choice_bias", "router", "router_reads", "dropout")
        names = ["mixing", *(name for name in others if getattr(options, name) != getattr(default, name))]
        sizes = ("in_features", "out_features", "num_experts", "rank", "scaling")
        shown = {name: getattr(self, name) for name in sizes} | {name: getattr(options, name) for name in names}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
