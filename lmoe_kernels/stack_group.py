# SPDX-License-Identifier: Apache-2.0
"""Groups of layers that a model calls with the same x one after another, such as q_proj, k_proj and v_proj.

The call of a group's first layer computes all of them as a stack (`lmoe_kernels.stack`) and keeps the results of the others.
Each of these takes its result if it is called with the same x, and if nothing that the result depends on has changed since.
Otherwise it computes alone, and so does every layer of a group that cannot be a stack at the moment.

Only the first layer starts a stack. Activation checkpointing may repeat any part of a forward, and each call must then save
as many tensors as it did the first time.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmoe_kernels import ops, stack
from lmoe_kernels.dispatch import requested_backend
from lmoe_kernels.functional import autocast, flat, unflat
from lmoe_kernels.linears import is_plain_linear
from lmoe_kernels.options import Options
from lmoe_kernels.stack import Projection

_Layer = Any  # an LMoELinear, which this module cannot import
_Result = tuple[Tensor, Tensor | None]  # y, and the router logits if the layer keeps them
_MOST_MISSES = 3


class Part(NamedTuple):
    """What a layer contributes to a stack: its projection without outside logits, and options that all layers must share."""

    projection: Projection
    options: Options
    backend: str | None


class _Kept(NamedTuple):
    """The results of a stack for the layers that have not been called yet, and what they were computed from."""

    x: weakref.ref[Tensor]
    of_x: tuple[object, ...]  # see `_circumstances`
    results: dict[int, _Result]
    states: list["_State"]  # of all layers

    @property
    def counts(self) -> bool:
        """Whether a result that is not taken shows that the stack was in vain.

        Hooks on saved tensors may be those of activation checkpointing. The repetition of a forward must compute what the
        forward computed, so a group does not stop between the two.
        """
        return self.of_x[-1] is None


class _State(NamedTuple):
    """What the result of a layer depends on, in addition to x. Two states are equal if their `values` are."""

    values: tuple[object, ...]
    tensors: tuple[Tensor, ...]  # are kept, so that no new tensor has the id of one of them


class StackGroup:
    """The layers of a group, in the order in which the model calls them. The group does not keep them alive.

    It stops after three stacks in a row of which a result was not taken, because then its layers read different tensors.

    Args:
        size: how many layers it has.
    """

    def __init__(self, size: int) -> None:
        self.size, self.misses = size, 0
        self._layers: dict[int, weakref.ref[_Layer]] = {}
        self._kept: _Kept | None = None

    def join(self, layer: _Layer, position: int) -> None:
        """Make a layer the one at this position, unless a living layer is: a shallow copy has the group of the original."""
        mine = self._layers.get(position)
        if mine is None or mine() is None:
            self._layers[position] = weakref.ref(layer)

    def result_of(self, layer: _Layer, position: int, x: Tensor) -> _Result | None:
        """The result of a layer's forward; None if it must compute alone."""
        mine = self._layers.get(position)
        if mine is None or mine() is not layer:  # the layer is a copy, for example a replica of DataParallel
            return None
        if position > 0:
            return None if self._kept is None else self._take(layer, position, x, self._kept)
        if self._kept is not None:
            self.misses += self._kept.counts
            self._kept = None
        return None if self.misses >= _MOST_MISSES else self._start(x)

    def _start(self, x: Tensor) -> _Result | None:
        """Compute all layers, keep the results of the others, and return that of the first."""
        if not isinstance(x, Tensor) or x.is_inference():  # it has no version, so a change in place would not be seen
            return None
        layers = [self._layers[i]() for i in range(self.size) if i in self._layers]
        parts = [part for layer in layers if layer is not None and (part := _part_of(layer)) is not None]
        if len(parts) != self.size or len({part[1:] for part in parts}) != 1:
            return None
        found = _compute(x, layers, parts)
        if found is None:
            return None
        states = [_state(layer, part) for layer, part in zip(layers, parts, strict=True)]
        results = dict(enumerate(found))
        first = results.pop(0)
        self._kept = _Kept(weakref.ref(x, lambda _: results.clear()), _circumstances(x), results, states)
        return first

    def _take(self, layer: _Layer, position: int, x: Tensor, kept: _Kept) -> _Result | None:
        """The result that is kept for a layer, if it is for this x and everything is as it was."""
        if kept.x() is not x or kept.of_x != _circumstances(x):
            return None
        result, part = kept.results.pop(position, None), _part_of(layer)
        if not kept.results:
            self._kept, self.misses = None, 0
        if part is None or _state(layer, part).values != kept.states[position].values:
            return None
        return result

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no layers: the copies of the layers join it."""
        return {"size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without layers and results."""
        self.__init__(state["size"])


class InGroup:
    """What `LMoELinear` has of its group."""

    _stacked: tuple[StackGroup, int] | None = None  # the group of layers that are computed together, and the position in it

    def join(self, group: StackGroup, position: int) -> None:
        """Be computed together with the layers of a group."""
        self._stacked = group, position
        group.join(self, position)

    def result_of_group(self, x: Tensor) -> _Result | None:
        """The result of this layer's forward, as a part of its group; None if it must compute alone."""
        if self._stacked is None or torch.compiler.is_compiling():
            return None
        group, position = self._stacked
        return group.result_of(self, position, x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let a copy join the copy of its group."""
        super().__setstate__(state)  # pyright: ignore[reportAttributeAccessIssue]
        if self._stacked is not None:
            self.join(*self._stacked)


def _part_of(layer: _Layer) -> Part | None:
    """What a layer contributes to a stack; None if its options or its frozen layer do not allow one."""
    base = layer.frozen_layer
    if layer.disabled or layer.shared_a or layer.has_choice_bias or (layer.training and layer.dropout):
        return None
    if not is_plain_linear(base) or (layer.gate_weight is None and layer.shared_router() is None):
        return None
    projection = Projection(layer.lora_a, layer.lora_b, layer.gate_weight, layer.gate_bias, None, base.weight, base.bias)
    options = Options(float(layer.scaling), layer.mixing, layer.top_k, layer.renormalize)
    return Part(projection, options, layer.backend)


def _compute(x: Tensor, layers: Sequence[_Layer], parts: Sequence[Part]) -> list[_Result] | None:
    """The results of all layers; None if they cannot be computed as a stack."""
    _, options, backend = parts[0]
    projections = [part.projection for part in parts]
    rows = x
    if ops.autocast_is_on():
        rows = autocast(x)
        projections = [p._replace(weight=autocast(p.weight), bias=autocast(p.bias)) for p in projections]
    rows = flat(rows)
    name = stack.backend_of(rows, projections, requested_backend("LMoELinear", backend))
    if name is None:
        return None
    outside: list[Tensor | None] = [None] * len(layers)
    if projections[0].gate_weight is None:
        outside = [layer.logits_of_router(x) for layer in layers]
        projections = [p._replace(gate_logits=flat(z)) for p, z in zip(projections, outside, strict=True)]
    of_rows = stack.apply(
        rows, projections, options, backend=name, return_logits=any(layer.output_router_logits for layer in layers)
    )
    results: list[_Result] = []
    for layer, (y, own), given in zip(layers, of_rows, outside, strict=True):
        logits = given if own is None else unflat(own, x)
        results.append((unflat(y, x), logits if layer.output_router_logits else None))
    return results


def _circumstances(x: Tensor) -> tuple[object, ...]:
    """What may change between the calls of two layers with the same tensor x. The last one is the hooks on saved tensors."""
    dtype = torch.get_autocast_dtype(x.device.type) if ops.autocast_is_on() else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    return x._version, x.requires_grad, torch.is_grad_enabled(), dtype, hooks


def _state(layer: _Layer, part: Part) -> _State:
    """What identifies the values that the result of a layer depends on."""
    router = layer.shared_router()
    named = part.projection if router is None else (*part.projection, *router.tensors())
    tensors = tuple(t for t in named if t is not None)
    return _State((layer.output_router_logits, *part[1:], *((id(t), t._version, t.requires_grad) for t in tensors)), tensors)
