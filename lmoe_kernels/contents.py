"""What of a model belongs into a checkpoint: which tensors, where they lie, and what tells the model from another."""

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor, nn

from lmoe_kernels.adapter import Adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.distributed import gathered, is_cut_out
from lmoe_kernels.naming import plain_key, plain_modules
from lmoe_kernels.targets import linear_layers, lmoe_layers, saved_modules


def adapter_of(op: str, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Adapter:
    """What a checkpoint of this model holds; with `state_dict`, the model's own or one gathered from it, its numbers.

    Raises:
        ValueError: the model has no L-MoE layers, or holds no numbers.
    """
    layers, saved = lmoe_layers(model), saved_modules(model)
    if not layers:
        fail(op, "model", "have L-MoE layers (see apply_lmoe)", "none")
    shapes = {f"{name}.{key}": shape for name, layer in layers.items() for key, shape in layer.shapes().items()}
    beside = tuple(f"{name}." for name in saved)

    def belongs(key: str) -> bool:
        return key in shapes or key.startswith(beside)

    if state_dict is None:
        check_within_reach(op, model)
        tensors = {key: t for key, t in gathered(model, {**layers, **parts_of(saved)}).items() if belongs(key)}
    else:
        tensors = {plain: t.detach().clone() for key, t in state_dict.items() if belongs(plain := plain_key(key))}
    if missing := next((key for key in shapes if key not in tensors), None):
        fail(op, "model" if state_dict is None else "state_dict", f"hold {missing!r}", "none of that name")
    for key, tensor in tensors.items():
        if tensor.is_meta:
            fail(op, "model", "hold numbers", f"{key!r} on the meta device")
        if key in shapes and tuple(tensor.shape) != shapes[key]:
            fail(op, key, f"have shape {shapes[key]}", f"{tuple(tensor.shape)}: a part of a sharded model?")
    options = {name: layer.config() for name, layer in layers.items()}
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return Adapter(options, whole, list(saved), digest_of_base(model))


def check_within_reach(op: str, model: nn.Module) -> None:
    """Whether the parameters can be made whole.

    Raises:
        ValueError: the model was taken out of what shards it.
    """
    if is_cut_out(model):
        must = "be what FullyShardedDataParallel returned"
        fail(op, "model", must, "the module inside of that (Accelerate's unwrap_model returns it)")


def parts_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All modules within these, by name."""
    return {
        f"{name}.{inner}" if inner else name: part
        for name, module in modules.items()
        for inner, part in plain_modules(module).items()
    }


def digest_of_base(model: nn.Module) -> str:
    """Tells models of other linear layers apart: a digest of their names and sizes, heads left out.

    It depends neither on which layers have experts, nor on dtypes, quantisation or wrappers.
    """
    sizes = sorted((name, *size) for name, size in linear_layers(model).items())
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
