"""The names that modules have in the plain model, whatever has been put around the model or its parts since.

torch.compile, activation checkpointing, FSDP, data parallelism and PEFT put modules around others, and with them a segment
into every name below. Checkpoints and targets use the names without these segments.
"""

from collections.abc import Iterator, Mapping

from torch import nn

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# PeftModel holds a tuner, the tuner the model, a tuner's layer the layer that it stands beside.
_WRAPPED_BY_PEFT = ("base_model", "model", "base_layer", "original_module")


def wrapped_child(module: nn.Module) -> str | None:
    """The name of the child around which this module is a wrapper, None where it is none."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    names = _WRAPPED_BY_PEFT if is_of_peft(module) else _WRAPPED
    return next((name for name in names if module._modules.get(name) is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model under the wrappers around the whole of it."""
    while (name := wrapped_child(model)) is not None:
        model = model.get_submodule(name)
    return model


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its name in the plain model, in the model's order; a shared one under each of its names.

    Of a wrapper and what it wraps, which have one name, the wrapped module is given.
    """
    return {plain: module for plain, _, module in _walk(model, "", "")}


def actual_names(model: nn.Module) -> dict[str, str]:
    """The names that `get_submodule` takes, by the names in the plain model."""
    return {plain: actual for plain, actual, _ in _walk(model, "", "")}


def set_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set these modules at their names in the plain model."""
    actual = actual_names(model)
    for name, module in modules.items():
        parent, _, child = actual[name].rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def plain_key(key: str) -> str:
    """A key of a state_dict as the plain model has it: most wrappers leave their segment in it, some do not."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPED)


def is_of_peft(module: nn.Module) -> bool:
    """Whether the module's class comes from PEFT, which need not be installed."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def _walk(module: nn.Module, plain: str, actual: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Name in the plain model, name as it is, module: a wrapper before what it wraps."""
    yield plain, actual, module
    wrapped = wrapped_child(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, plain if name == wrapped else _joined(plain, name), _joined(actual, name))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
