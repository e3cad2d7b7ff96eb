# SPDX-License-Identifier: Apache-2.0
"""`LMoETunerLinear`: a layer of PEFT around a linear layer, with one mixture of experts for each adapter."""

from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.linears import features_of, weight_of
from lmoe_kernels.mixture import Choice, LayerWithExperts, Mixture, add_experts, initialise
from lmoe_kernels.peft.config import LMoEConfig
from lmoe_kernels.peft.saved import DICTIONARIES

_NOT_TRAINED = "choice_bias"
NO_SINGLE_WEIGHT = "experts that each token mixes in its own way; call unload() to remove them"


class LMoETunerLinear(nn.Module, BaseTunerLayer, LayerWithExperts):
    """A frozen linear layer with the experts of one or several adapters of PEFT.

    `LMoEModel` creates these layers. The active adapters are added one after another, each with its own gate:

    Semantics:
        y = base_layer(x) + sum of lmoe(x, lmoe_A[a], lmoe_B[a], gate_weight=lmoe_gate[a], ...) over the active adapters a

    Args:
        base_layer: the linear layer of the model, see `LMoELinear.from_linear`.
        name: the name of the layer in the model.
        configs: the configurations of the model's adapters, which PEFT saves.

    Attributes:
        lmoe_A: (E, R, I) or (1, R, I) by adapter. Experts and gate are fp32 for every dtype of the base layer except fp64;
            with autocast_adapter_dtype=False of PEFT they have its dtype.
        lmoe_B: (E, R, O) by adapter, initialised to zero.
        lmoe_gate: (E, I) by adapter.
        lmoe_gate_bias: (E) by adapter, for those with gate_bias.
        lmoe_choice_bias: (E) in fp32 by adapter, for those with choice_bias. It is saved, but never trained by a gradient.
        lmoe_options: the options of each adapter.

    Raises:
        TypeError: `base_layer` is not a linear layer.
        ValueError: `base_layer` already has experts; in forward, as `lmoe`.
    """

    adapter_layer_names = ("lmoe_A", "lmoe_B", "lmoe_gate", "lmoe_gate_bias")
    other_param_names = ("lmoe_choice_bias", "lmoe_options")

    def __init__(self, base_layer: nn.Module, name: str, configs: dict[str, LMoEConfig]) -> None:
        super().__init__()
        features = features_of(base_layer)
        if features is None:
            got = f"{type(base_layer).__name__} for {name!r}"
            checks.fail("LMoEModel", "target_modules", "name layers with in_features and out_features", got, TypeError)
        if isinstance(base_layer, LMoELinear):
            checks.fail("LMoEModel", "target_modules", "name layers without experts", f"{name!r} with those of apply_lmoe")
        self.base_layer = base_layer
        self.in_features, self.out_features = features
        self._name, self._configs = name, configs
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        for dictionary in DICTIONARIES.values():
            self.add_module(dictionary, nn.ParameterDict())
        self.lmoe_options: dict[str, LayerConfig] = {}
        self.lmoe_load = nn.Module()  # the loads of the experts are its buffers, which are not saved
        self._router_logits: dict[str, Tensor] = {}
        self.train(base_layer.training)  # a new module is in training mode, and so would drop out in an evaluated model

    def update_layer(self, adapter: str, options: LayerConfig) -> None:
        """Create the experts and the gate of an adapter."""
        weight = weight_of(self.base_layer)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tensors = {
            key: nn.Parameter(
                torch.empty(shape, device=weight.device, dtype=torch.float32 if key == _NOT_TRAINED else dtype),
                requires_grad=key != _NOT_TRAINED,
            )
            for key, shape in options.shapes(self.in_features, self.out_features).items()
        }
        self._set(adapter, options, tensors)
        initialise(Mixture(options, dict(tensors)))

    def _set(self, adapter: str, options: LayerConfig, tensors: dict[str, nn.Parameter]) -> None:
        """Make these the options and the parameters of an adapter."""
        self.lmoe_options[adapter] = options
        for key, dictionary in DICTIONARIES.items():
            parameters = self._parameters_of(dictionary)
            if key in tensors:
                parameters[adapter] = tensors[key]
            elif adapter in parameters:
                del parameters[adapter]
        bias = tensors.get(_NOT_TRAINED)
        load = None if bias is None else torch.zeros_like(bias, requires_grad=False)
        self.lmoe_load.register_buffer(adapter, load, persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the frozen layer plus the deltas of the active adapters.

        Args:
            x: (..., I), see `lmoe`.
            args: other arguments of the base layer.
            kwargs: other keywords of the base layer.

        Returns:
            y (..., O) in x's dtype.
        """
        if self._router_logits:
            self._router_logits = {}  # if this forward fails or keeps none, no loss may use those of an earlier batch
        adapters = [] if self.disable_adapters else self.active()
        if args or kwargs or not adapters:
            y: nn.Module | Tensor = self.base_layer(x, *args, **kwargs)
        else:
            y = self.base_layer
        for adapter in adapters:
            y, router_logits = self._add(adapter, y, x)
            if router_logits is not None:
                self._router_logits[adapter] = router_logits
        assert isinstance(y, Tensor)
        return y

    def _add(self, adapter: str, base: nn.Module | Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the delta of one adapter to the base layer or to its output."""
        options, tensors = self.lmoe_options[adapter], self._tensors(adapter)
        assert options.alpha is not None
        choice = None
        if (bias := tensors.pop(_NOT_TRAINED, None)) is not None:
            choice = Choice(bias, self.lmoe_load.get_buffer(adapter) if self.training else None)
        # Kernels take parameters in x's dtype or fp32; others get a copy in fp32, so that x and the output keep their dtype.
        factors = {k: t if t.dtype in (x.dtype, torch.float32) else t.float() for k, t in tensors.items()}
        keywords: dict[str, Any] = {
            "gate_weight": factors["gate_weight"],
            "gate_bias": factors.get("gate_bias"),
            "scaling": options.alpha / options.rank,
            "mixing": options.mixing,
            "top_k": options.top_k,
            "renormalize": options.renormalize,
            "dropout": options.dropout if self.training else 0.0,
            "backend": options.backend,
            "return_router_logits": options.output_router_logits,
        }
        return add_experts(base, x, factors["lora_a"], factors["lora_b"], keywords, choice)

    def _tensors(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of an adapter by the names of `LayerConfig.shapes`."""
        dictionaries = {key: self._parameters_of(dictionary) for key, dictionary in DICTIONARIES.items()}
        return {key: parameters[adapter] for key, parameters in dictionaries.items() if adapter in parameters}

    def _parameters_of(self, dictionary: str) -> nn.ParameterDict:
        parameters = self._modules[dictionary]
        assert isinstance(parameters, nn.ParameterDict)
        return parameters

    def wrapped(self) -> nn.Module:
        """The layer inside of those of PEFT, see `LayerWithExperts`."""
        return self.base_layer

    def active(self) -> list[str]:
        """The active adapters that have experts in this layer, see `LayerWithExperts`."""
        return [name for name in self.active_adapters if name in self.lmoe_options]

    def mixtures(self) -> dict[str, Mixture]:
        """The mixtures of all adapters of this layer, active or not, see `LayerWithExperts`."""
        return {adapter: Mixture(options, self._tensors(adapter)) for adapter, options in self.lmoe_options.items()}

    def set_mixture(self, adapter: str, mixture: Mixture) -> None:
        """Replace the experts and the gate of an adapter, see `LayerWithExperts`. The configuration of PEFT follows."""
        trained = self._parameters_of("lmoe_B")[adapter].requires_grad
        tensors = {
            key: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, trained and key != _NOT_TRAINED)
            for key, tensor in mixture.tensors.items()
        }
        self._set(adapter, mixture.config, tensors)
        self._configs[adapter] = self._configs[adapter].with_layer(self._name, mixture.config)

    def keep_router_logits(self, adapter: str, keep: bool) -> None:
        """Set the option output_router_logits of an adapter, see `LayerWithExperts`."""
        self.lmoe_options[adapter] = self.lmoe_options[adapter]._replace(output_router_logits=keep)
        if not keep:
            self._router_logits.pop(adapter, None)

    def kept_router_logits(self) -> dict[str, Tensor]:
        """The router logits of the last forward by adapter, see `LayerWithExperts`."""
        return dict(self._router_logits)

    def loads(self) -> dict[str, Tensor]:
        """The loads of the experts of the adapters that have a choice_bias, see `LayerWithExperts`."""
        return {adapter: load for adapter, load in self.lmoe_load._buffers.items() if load is not None}

    def cast(self, adapter: str, dtype: torch.dtype | None) -> None:
        """Cast the trained parameters of an adapter; None casts those in half precision to fp32."""
        for name in self.adapter_layer_names:
            parameters = self._parameters_of(name)
            if adapter not in parameters:
                continue
            old = parameters[adapter]
            new = dtype if dtype is not None else torch.promote_types(old.dtype, torch.float32)
            if new != old.dtype:
                parameters[adapter] = nn.Parameter(old.detach().to(new), old.requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.lmoe_load._buffers:
            delattr(self.lmoe_load, adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise ValueError: the experts are no single weight that could be added to that of the base layer."""
        checks.fail("merge", "the adapter", "have one weight for all tokens", NO_SINGLE_WEIGHT)

    def unmerge(self) -> None:
        """Do nothing, because `merge` never merges."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the device of the base layer. PEFT would also cast it to the dtype of that layer."""
        device = device or weight_of(self.base_layer).device
        for dictionary in DICTIONARIES.values():
            parameters = self._parameters_of(dictionary)
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].to(device)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the router logits out of copies, because a tensor with a graph cannot be copied."""
        return {**self.__dict__, "_router_logits": {}}
