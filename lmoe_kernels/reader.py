# SPDX-License-Identifier: Apache-2.0
"""Reads the layers of a checkpoint without a model, and checks them as far as that is possible."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lmoe_kernels import checks
from lmoe_kernels.adapter import WEIGHTS, read_adapter, without_later_defaults
from lmoe_kernels.config import CONFIG_KEYS, LayerConfig

_OF_ROUTER = ("router.gate_weight", "router.gate_bias")


class SavedLayer(NamedTuple):
    """One layer of a checkpoint."""

    config: LayerConfig  # what the checkpoint does not store has the default
    tensors: dict[str, Tensor]  # lora_a, lora_b, gate_weight and so on; router.gate_weight of the first layer of a router

    @property
    def features(self) -> tuple[int, int]:
        """I and O."""
        return self.tensors["lora_a"].shape[-1], self.tensors["lora_b"].shape[-1]


class SavedLayers(NamedTuple):
    """What `read_lmoe` returns."""

    layers: dict[str, SavedLayer]  # by their names in the plain model, in the order of the file
    modules_to_save: dict[str, Tensor]  # the tensors of other trained modules, by their names in the plain model
    digest: str  # of the names, options and shapes of the layers; equal for equal options, whatever the numbers are


def read_lmoe(directory: str | os.PathLike[str]) -> SavedLayers:
    """Read what `save_lmoe` wrote without a model: the options and the tensors of every layer.

    The options, the shapes and the dtypes are checked. Whether they fit a model is not: `load_lmoe` checks that.

    Args:
        directory: the directory that `save_lmoe` wrote to.

    Returns:
        `layers`, the pairs (config, tensors) by the names of the layers in the plain model; `modules_to_save`, other trained
        tensors by name; `digest`, a text that two checkpoints share if their layers have equal names, options and shapes.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        ValueError: a file was not written by `save_lmoe`; a tensor is missing, unknown or has another shape.

    Example:
        config, tensors = read_lmoe("adapter").layers["model.layers.0.self_attn.q_proj"]

    Source: L-MoE, arXiv 2510.17898.
    """
    return saved_layers("read_lmoe", directory)


def saved_layers(op: str, directory: str | os.PathLike[str]) -> SavedLayers:
    """`read_lmoe` for a caller whose name the errors show."""
    adapter = read_adapter(op, directory)
    layers: dict[str, SavedLayer] = {}
    known: set[str] = set()
    for name, options in adapter.layers.items():
        config = config_of(op, name, options)
        features = [_last_size(op, f"{name}.{key}", adapter.tensors) for key in ("lora_a", "lora_b")]
        check_layer(op, name, config, (features[0], features[1]), adapter.tensors)
        keys = [*config.shapes(0, 0), *(key for key in _OF_ROUTER if f"{name}.{key}" in adapter.tensors)]
        layers[name] = SavedLayer(config, {key: adapter.tensors[f"{name}.{key}"] for key in keys})
        known |= {f"{name}.{key}" for key in keys}
    inside = tuple(f"{name}." for name in adapter.modules_to_save)
    saved = {key: tensor for key, tensor in adapter.tensors.items() if key.startswith(inside) and key not in known}
    check_keys(op, adapter.tensors, known | saved.keys())
    return SavedLayers(layers, saved, _digest(layers))


def config_of(op: str, name: str, options: dict[str, Any]) -> LayerConfig:
    """The options of a layer in a checkpoint, which must be those that `save_lmoe` writes."""
    if options.keys() != set(CONFIG_KEYS):
        checks.fail(op, f"layer {name!r}", f"have the options {sorted(CONFIG_KEYS)}", sorted(options))
    return LayerConfig(**options)


def check_layer(op: str, name: str, config: LayerConfig, features: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """Check the options of a layer, and that its tensors have the shapes that follow for these features I and O."""
    try:
        checks.check_finite("LMoELinear", "alpha", config.alpha, "be a finite number")
        config.check()
    except (ValueError, TypeError) as error:
        raise ValueError(str(error).replace("LMoELinear:", f"{op}: layer {name!r}:")) from None
    for key, shape in config.shapes(*features).items():
        check_tensor(op, f"{name}.{key}", tensors, shape)


def check_tensor(op: str, key: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Check that there is a tensor of this name, shape and a dtype of trained tensors."""
    _check_present(op, key, tensors)
    if tensors[key].shape != shape:
        checks.fail(op, f"tensor {key!r}", f"have shape {shape}", tuple(tensors[key].shape))
    if tensors[key].dtype not in checks.DTYPES:
        checks.fail(
            op, f"tensor {key!r}", f"have one of the dtypes {', '.join(map(str, checks.DTYPES))}", tensors[key].dtype
        )


def check_keys(op: str, tensors: Mapping[str, Tensor], known: set[str]) -> None:
    """Check that every tensor belongs to a layer or to a module of modules_to_save."""
    unknown = sorted(tensors.keys() - known)
    if unknown:
        shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        checks.fail(op, WEIGHTS, "hold only tensors of its layers and modules_to_save", f"{len(unknown)} unknown: {shown}")


def _check_present(op: str, key: str, tensors: Mapping[str, Tensor]) -> None:
    if key not in tensors:
        checks.fail(op, WEIGHTS, f"hold {key!r}", "none of that name")


def _last_size(op: str, key: str, tensors: Mapping[str, Tensor]) -> int:
    _check_present(op, key, tensors)
    return tensors[key].shape[-1] if tensors[key].dim() else 0


def _digest(layers: Mapping[str, SavedLayer]) -> str:
    described = {}
    for name, (config, tensors) in layers.items():
        options = without_later_defaults(config.stored())
        described[name] = options, {key: list(tensor.shape) for key, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
