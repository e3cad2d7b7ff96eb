# SPDX-License-Identifier: Apache-2.0
"""Collects the contents of a checkpoint from a model, and computes the digest that identifies the frozen model."""

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor, nn

from lmoe_kernels.adapter import Adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.distributed import gathered, lacks_fsdp1_wrapper
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.naming import plain_key, plain_modules
from lmoe_kernels.routers import Router
from lmoe_kernels.targets import layers_with_experts, linear_layers, lmoe_layers, saved_modules


def adapter_of(op: str, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Adapter:
    """Collect the contents of a checkpoint: from the model, or from `state_dict` if it is given.

    Raises:
        ValueError: the model has no L-MoE layers, a tensor is missing, sharded or on the meta device, or the model is the
            module inside an FSDP1 wrapper.
    """
    layers, saved = lmoe_layers(model), saved_modules(model)
    if not layers:
        got = "only those of a PEFT adapter (its save_pretrained saves them)" if layers_with_experts(model) else "none"
        fail(op, "model", "have L-MoE layers (see apply_lmoe)", got)
    own = with_routers(layers)
    shapes = {f"{name}.{key}": shape for name, part in own.items() for key, shape in part.shapes().items()}
    prefixes = tuple(f"{name}." for name in saved)

    def belongs(key: str) -> bool:
        return key in shapes or key.startswith(prefixes)

    if state_dict is None:
        check_gatherable(op, model)
        tensors = {key: t for key, t in gathered(model, {**own, **parts_of(saved)}).items() if belongs(key)}
    else:
        tensors = {plain: t.detach().clone() for key, t in state_dict.items() if belongs(plain := plain_key(key))}
    if missing := next((key for key in shapes if key not in tensors), None):
        fail(op, "model" if state_dict is None else "state_dict", f"hold {missing!r}", "none of that name")
    for key, tensor in tensors.items():
        if tensor.is_meta:
            fail(op, "model", "have data", f"{key!r} on the meta device")
        if key in shapes and tuple(tensor.shape) != shapes[key]:
            fail(op, key, f"have shape {shapes[key]}", f"{tuple(tensor.shape)}: a part of a sharded model?")
    options = {name: layer.config() for name, layer in layers.items()}
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return Adapter(options, whole, list(saved), digest_of_base(model))


def check_gatherable(op: str, model: nn.Module) -> None:
    """Check that the model's parameters can be gathered.

    Raises:
        ValueError: the model is the module inside an FSDP1 wrapper.
    """
    if lacks_fsdp1_wrapper(model):
        must = "be the module that FullyShardedDataParallel returned"
        fail(op, "model", must, "the module inside it (Accelerate's unwrap_model returns that)")


def with_routers(layers: Mapping[str, LMoELinear]) -> dict[str, LMoELinear | Router]:
    """These layers by their names, and the routers that they have as "<name of the layer>.router"."""
    routers = {f"{name}.router": layer.router for name, layer in layers.items() if layer.router is not None}
    return {**layers, **routers}


def parts_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """These modules and all their submodules, by name."""
    return {
        f"{name}.{inner}" if inner else name: part
        for name, module in modules.items()
        for inner, part in plain_modules(module).items()
    }


def digest_of_base(model: nn.Module) -> str:
    """A digest of the names and sizes of the model's linear layers without its heads, which identifies the frozen model.

    It does not depend on which layers have experts, nor on dtypes, quantisation or wrappers.
    """
    sizes = sorted((name, *size) for name, size in linear_layers(model).items())
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
