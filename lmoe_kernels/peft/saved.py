# SPDX-License-Identifier: Apache-2.0
"""The shapes of the tensors in a directory that PEFT saved, so that they are checked before a model changes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmoe_kernels.adapter import safetensors
from lmoe_kernels.checks import fail

WEIGHTS = "adapter_model.safetensors"
# The parameter dictionaries of a layer, by the names of `LayerConfig.shapes`.
DICTIONARIES = {
    "lora_a": "lmoe_A",
    "lora_b": "lmoe_B",
    "gate_weight": "lmoe_gate",
    "gate_bias": "lmoe_gate_bias",
    "choice_bias": "lmoe_choice_bias",
}
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.*)\.(?P<tensor>lmoe_[^.]*)")

Shapes = dict[str, tuple[int, ...]]  # by the keys of a state dict
LayerShapes = dict[str, Shapes]  # for each layer, by the names of its dictionaries


def read_shapes(op: str, directory: Path) -> Shapes | None:
    """The shapes in the directory's file of tensors; None if there is no such file.

    Raises:
        ValueError: it is not a complete safetensors file.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        return None
    try:
        with safetensors(op).safe_open(path, "pt") as file:
            # safe_open has keys() but cannot be iterated
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # not every release of safetensors exports its SafetensorError
        fail(op, str(path), "be a complete safetensors file", str(error).partition("\n")[0])


def layers_of(shapes: Mapping[str, Sequence[int]]) -> LayerShapes:
    """The shapes in a saved state dict that belong to layers with experts, by layer."""
    layers: LayerShapes = {}
    for key, shape in shapes.items():
        if found := _KEY.fullmatch(key):
            layers.setdefault(found["layer"], {})[found["tensor"]] = tuple(shape)
    return layers


def check_layers(op: str, expected: LayerShapes, saved: LayerShapes, where: str) -> None:
    """Check that exactly the expected tensors were saved, each with its shape.

    Raises:
        ValueError: a tensor is missing, belongs to no layer, or has another shape.
    """
    for layer, shapes in expected.items():
        named = {f"{layer}.{tensor}": shape for tensor, shape in saved.get(layer, {}).items()}
        check_shapes(op, {f"{layer}.{tensor}": shape for tensor, shape in shapes.items()}, named, where)
    for layer, shapes in saved.items():
        if unknown := next((tensor for tensor in shapes if tensor not in expected.get(layer, {})), None):
            must = "hold only tensors that the model and the configuration of the adapter have"
            fail(op, where, must, repr(f"{layer}.{unknown}"))


def check_shapes(op: str, expected: Shapes, saved: Shapes, where: str) -> None:
    """Check that the expected tensors were saved, each with its shape.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    for name, shape in expected.items():
        if name not in saved:
            fail(op, where, f"hold {name!r}", "none of that name")
        if saved[name] != shape:
            fail(op, f"{name!r} in {where}", f"have shape {shape}", saved[name])
