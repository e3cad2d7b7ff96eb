# SPDX-License-Identifier: Apache-2.0
"""The sizes and the weight of a linear layer of any class, and whether calling it is more than `F.linear`."""

from itertools import chain
from typing import TypeGuard

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
