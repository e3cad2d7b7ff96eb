# SPDX-License-Identifier: Apache-2.0
"""The names of modules in the plain model, that is, without the wrappers around the model and its modules.

torch.compile, activation checkpointing, FSDP, data parallelism and PEFT wrap modules, which adds a segment to the name of
every module inside. Checkpoints and targets use the names without these segments.
"""

from collections.abc import Iterator, Mapping

from torch import nn

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# PeftModel wraps a tuner, the tuner wraps the model, and the tuner's layers wrap layers of the model.
_WRAPPED_BY_PEFT = ("base_model", "model", "base_layer", "original_module")


def wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that this module wraps; None if the module is not a wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    names = _WRAPPED_BY_PEFT if is_of_peft(module) else _WRAPPED
    return next((name for name in names if module._modules.get(name) is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all wrappers that are around the whole model."""
    while (name := wrapped_child(model)) is not None:
        model = model.get_submodule(name)
    return model


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their names in the plain model, in the model's order; a shared module appears under each of its names.

    A wrapper and the module that it wraps have the same name, which maps to the wrapped module.
    """
    return {plain: module for plain, _, module in walk(model, "", "")}


def actual_names(model: nn.Module) -> dict[str, str]:
    """The names for `get_submodule`, by the names in the plain model."""
    return {plain: actual for plain, actual, _ in walk(model, "", "")}


def set_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set these modules at their names in the plain model."""
    actual = actual_names(model)
    for name, module in modules.items():
        parent, _, child = actual[name].rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def plain_key(key: str) -> str:
    """Convert a key of a state_dict to that of the plain model. The keys contain the segments of some wrappers."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPED)


def is_of_peft(module: nn.Module) -> bool:
    """Whether the module's class or one of its base classes comes from PEFT. Works without importing PEFT."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def walk(module: nn.Module, plain: str, actual: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (name in the plain model, actual name, module) for every module, a wrapper before the module that it wraps."""
    yield plain, actual, module
    wrapped = wrapped_child(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, plain if name == wrapped else _joined(plain, name), _joined(actual, name))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
