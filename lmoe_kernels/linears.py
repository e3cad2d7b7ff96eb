# SPDX-License-Identifier: Apache-2.0
"""Linear layers of any class: sizes, weight, whether a call is more than `F.linear`, and modules in place of one."""

from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def features_of(linear: nn.Module) -> tuple[int, int] | None:
    """The in and out features of a linear layer; None for any other module."""
    features = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    weight, width = getattr(linear, "weight", None), getattr(linear, "nf", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and width == weight.shape[1]:  # transformers' Conv1D
        return weight.shape[0], weight.shape[1]
    return None


def weight_of(linear: nn.Module) -> Tensor:
    """A tensor with the device and the dtype of the layer."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next(chain(linear.parameters(), linear.buffers()), torch.empty(0))  # the layers of GPTQ have only buffers


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer only runs `F.linear` on plain tensors, so that `lmoe_linear` can compute its product."""
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__  # accelerate replaces forward on the instance if it offloads weights
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


class InPlaceOfLinear(nn.Module):
    """A module that models use in place of a linear layer, which it has as `frozen_layer`."""

    frozen_layer: nn.Module

    @property
    def weight(self) -> Any:
        """The frozen layer's weight. Some models read its dtype (transformers' T5)."""
        return self.frozen_layer.weight

    @property
    def bias(self) -> Any:
        """The frozen layer's bias."""
        return self.frozen_layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        """Set `weight` and `bias` on the frozen layer, so that code that ties them to an embedding works."""
        if name in ("weight", "bias"):
            setattr(self.frozen_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Accept the frozen layer's tensors also under their names in the plain model, as in its checkpoints."""
        known = (*self._parameters, *self._buffers, *self._modules)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            if rest.partition(".")[0] not in known:
                state_dict.setdefault(f"{prefix}frozen_layer.{rest}", state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
