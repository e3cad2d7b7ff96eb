# SPDX-License-Identifier: Apache-2.0
"""Keeps the rows of frozen experts in the stacked parameters of a layer as they are.

Two kinds of hooks do it. A hook on each parameter sets the gradient of the rows to zero, so that gradient clipping and
momentum do not see it. Hooks on the steps of all optimizers of torch restore the rows, because weight decay and the momentum
of earlier steps move a row even if its gradient is zero.
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lmoe_kernels.checks import fail
from lmoe_kernels.mixture import LayerWithExperts

_ATTRIBUTE = "_frozen_experts"


class FrozenExperts:
    """The frozen experts of one layer, by name, so that they stay the same experts if others are added or removed."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer
        self._names: dict[str, set[str]] = {}  # by adapter
        self._start()
        layer.register_forward_pre_hook(_hook_new_parameters)

    def _start(self) -> None:
        self._hooked: dict[tuple[str, str], weakref.ref[Tensor]] = {}  # the parameters that have a hook
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}  # rows and their copies, by the optimizer that is at a step
        _with_frozen.add(self)
        if not _hooks_of_optimizers:
            _hooks_of_optimizers.append(register_optimizer_step_pre_hook(_before_step))
            _hooks_of_optimizers.append(register_optimizer_step_post_hook(_after_step))

    def freeze(self, adapter: str, name: str, frozen: bool) -> None:
        """Freeze an expert, or train it again."""
        names = self._names.setdefault(adapter, set())
        (names.add if frozen else names.discard)(name)
        self.hook_parameters()

    def hook_parameters(self) -> None:
        """Let parameters without a hook set the gradients of frozen rows to zero: new ones, and those of a copied layer."""
        for adapter, names in self._names.items():
            for key, parameter in self._parameters(adapter).items() if names else ():
                hooked = self._hooked.get((adapter, key))
                if parameter.requires_grad and (hooked is None or hooked() is not parameter):
                    parameter.register_hook(partial(self._without_rows, adapter))
                    self._hooked[adapter, key] = weakref.ref(parameter)

    def _without_rows(self, adapter: str, gradient: Tensor) -> Tensor | None:
        numbers = self._numbers(adapter)
        if not numbers:
            return None
        gradient = gradient.clone()  # another gradient may share its memory
        for number in numbers:
            gradient[number].zero_()
        return gradient

    def _numbers(self, adapter: str) -> list[int]:
        """The numbers of the frozen experts of an adapter."""
        mixture = self._layer.mixtures().get(adapter)
        names = () if mixture is None else mixture.config.names()
        return [number for number, name in enumerate(names) if name in self._names[adapter]]

    def keep_rows(self, optimizer: Optimizer) -> None:
        """Copy the frozen rows before a step of an optimizer."""
        self.hook_parameters()
        rows = [
            parameter.detach()[number]
            for adapter in self._names
            for number in self._numbers(adapter)
            for parameter in self._parameters(adapter).values()
        ]
        self._kept[id(optimizer)] = [(row, row.clone()) for row in rows]

    def restore_rows(self, optimizer: Optimizer) -> None:
        """Write the copies back after the step."""
        for row, kept in self._kept.pop(id(optimizer), ()):
            row.copy_(kept)

    def _parameters(self, adapter: str) -> dict[str, Tensor]:
        """The parameters of an adapter in which each expert has rows of its own."""
        mixture = self._layer.mixtures().get(adapter)
        if mixture is None:  # the adapter was deleted
            return {}
        keys = ("lora_b",) if mixture.config.shared_a else ("lora_a", "lora_b")
        if any(map(_is_sharded, map(mixture.tensors.__getitem__, keys))):
            must = "not be sharded with a frozen expert, because a process holds only parts of the experts"
            fail("freeze_expert", "model", must, "a model of FSDP")
        return {key: mixture.tensors[key] for key in keys}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the layer keeps: its parameters have no hooks yet."""
        return {"_layer": self._layer, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def frozen_experts_of(layer: LayerWithExperts) -> FrozenExperts:
    """The frozen experts of a layer; none at first."""
    assert isinstance(layer, nn.Module)
    if _ATTRIBUTE not in vars(layer):
        setattr(layer, _ATTRIBUTE, FrozenExperts(layer))
    return vars(layer)[_ATTRIBUTE]


_with_frozen: "weakref.WeakSet[FrozenExperts]" = weakref.WeakSet()
_hooks_of_optimizers: list[Any] = []  # registered with the first frozen expert


def _hook_new_parameters(layer: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        vars(layer)[_ATTRIBUTE].hook_parameters()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for experts in list(_with_frozen):
        experts.keep_rows(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for experts in list(_with_frozen):
        experts.restore_rows(optimizer)


def _is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP or tensor parallelism holds this parameter."""
    return (
        not isinstance(parameter, nn.Parameter) or hasattr(parameter, "full_tensor") or hasattr(parameter, "_fsdp_flattened")
    )
