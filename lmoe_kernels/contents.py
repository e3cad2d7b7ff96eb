"""What of a model belongs into a checkpoint: which tensors, where they lie, and what tells the model from another."""

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor, nn

from lmoe_kernels.adapter import Adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.distributed import gathered
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.naming import plain_key, plain_modules
from lmoe_kernels.targets import linear_layers, lmoe_layers, saved_modules

Places = dict[str, tuple[nn.Module, str]]


def adapter_of(op: str, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Adapter:
    """What a checkpoint of this model holds; with `state_dict`, the model's own or one gathered from it, its numbers.

    Raises:
        ValueError: the model has no L-MoE layers, or holds no numbers.
    """
    layers, saved = lmoe_layers(model), saved_modules(model)
    if not layers:
        fail(op, "model", "have L-MoE layers (see apply_lmoe)", "none")
    shapes = {f"{name}.{key}": shape for name, layer in layers.items() for key, shape in layer.shapes().items()}
    places: Places = {key: place for name, layer in layers.items() for key, place in places_of_layer(name, layer).items()}
    places |= {key: place for name, module in saved.items() for key, place in places_of_module(name, module).items()}
    if state_dict is None:
        tensors = gathered(model, places)
    else:
        given = {plain_key(key): tensor for key, tensor in state_dict.items()}
        if missing := next((key for key in places if key not in given), None):
            fail(op, "state_dict", f"hold {missing!r}", "none of that name")
        tensors = {key: given[key].detach().clone() for key in places}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            fail(op, "model", "hold numbers", f"{key!r} on the meta device")
        if key in shapes and tuple(tensor.shape) != shapes[key]:
            fail(op, key, f"have shape {shapes[key]}", f"{tuple(tensor.shape)}: a part of a sharded model?")
    options = {name: layer.config() for name, layer in layers.items()}
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return Adapter(options, whole, list(saved), digest_of_base(model))


def places_of_layer(name: str, layer: LMoELinear) -> Places:
    """Where experts and gate of a layer lie, by their keys in the checkpoint."""
    return {f"{name}.{key}": (layer, key) for key in layer.shapes()}


def places_of_module(name: str, module: nn.Module) -> Places:
    """Where the tensors of a module of modules_to_save lie: its parameters and the buffers that its state_dict holds."""
    places: Places = {}
    for inner, part in plain_modules(module).items():
        buffers = part._buffers.keys() - part._non_persistent_buffers_set
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None and (key in part._parameters or key in buffers):
                places[".".join(filter(None, (name, inner, key)))] = (part, key)
    return places


def digest_of_base(model: nn.Module) -> str:
    """Tells models of other linear layers apart: a digest of their names and sizes, heads left out.

    It depends neither on which layers have experts, nor on dtypes, quantisation or wrappers.
    """
    sizes = sorted((name, *size) for name, size in linear_layers(model).items())
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
