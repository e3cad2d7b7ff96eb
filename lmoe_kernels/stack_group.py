# SPDX-License-Identifier: Apache-2.0
"""Groups of layers that are usually called with the same x one after another, such as q_proj, k_proj and v_proj.

The call of a group's first layer computes all of them as a stack (`lmoe_kernels.stack`) and keeps the other results. The other
layers take theirs if they are called with the same x and nothing that the result depends on has changed since. Otherwise they
compute alone, and so does every layer of a group that cannot be a stack at the moment.

A first layer alone can start a stack: activation checkpointing repeats any part of a forward, and a layer must then save the
same tensors as the first time.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lmoe_kernels import dispatch, ops, stack
from lmoe_kernels.functional import autocast, flat, unflat
from lmoe_kernels.options import Options
from lmoe_kernels.stack import Projection

_MISSES = 3  # after so many stacks in a row with a result that no layer took, a group stops


class Part(NamedTuple):
    """What a layer contributes to a stack: its projection, and the options that all layers of the stack must share."""

    projection: Projection
    options: Options
    backend: dispatch.BackendName | None
    return_logits: bool


class StackableLayer(Protocol):
    """A layer that can be in a group."""

    def part_of_stack(self, x: Tensor) -> Part | None:
        """What the layer contributes to a stack on x; None if it must compute alone."""
        ...


class StackGroup:
    """The layers of a group, in the order in which the model calls them. It does not keep them alive."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._layers: dict[str, weakref.ref[Any]] = {}
        self._results: _Results | None = None
        self._misses = 0

    def join(self, name: str, layer: StackableLayer) -> None:
        """Make a layer the one of this name."""
        self._layers[name] = weakref.ref(layer)

    def result_of(self, name: str, layer: StackableLayer, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """y and the router logits of a layer, which are None unless it returns them; None if it must compute alone."""
        if torch.compiler.is_compiling() or self._misses >= _MISSES or not isinstance(x, Tensor):
            return None
        mine = self._layers.get(name)
        if mine is None or mine() is not layer:  # a copy of the layer, as in a replica of DataParallel
            return None
        if name == self.names[0]:
            return self._start(x)
        return None if self._results is None else self._take(name, layer, x, self._results)

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Compute all layers, keep the results of the others, and return that of the first."""
        if self._results is not None and self._results.counts:
            self._misses += 1
        self._results = None
        if x.is_inference() or x.dim() == 0:  # a change in place would not be seen
            return None
        layers = [self._layers[name]() for name in self.names if name in self._layers]
        parts = [None if layer is None else layer.part_of_stack(x) for layer in layers]
        if len(parts) != len(self.names) or None in parts:
            return None
        found = _compute(x, [part for part in parts if part is not None])
        if found is None:
            return None
        states = [_state(part) for part in parts if part is not None]
        first, *others = found
        self._results = _Results(x, dict(zip(self.names[1:], zip(others, states[1:], strict=True), strict=True)))
        return first

    def _take(self, name: str, layer: StackableLayer, x: Tensor, results: "_Results") -> tuple[Tensor, Tensor | None] | None:
        """The result that is kept for a layer, if it is for this x and everything is as it was."""
        if results.x() is not x or results.version != x._version or results.context != _context(x):
            return None
        kept = results.of_layers.pop(name, None)
        if not results.of_layers:
            self._results, self._misses = None, 0
        part = layer.part_of_stack(x)
        if kept is None or part is None or _state(part) != kept[1]:
            return None
        return kept[0]

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no layers: the copies of the layers join it."""
        return {"names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["names"])
