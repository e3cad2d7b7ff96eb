"""Save and load what was trained: experts, gates and modules_to_save, under their names in the plain model."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.adapter import WEIGHTS, Adapter, read_adapter, safetensors, write_adapter
from lmoe_kernels.config import CONFIG_KEYS, LayerConfig
from lmoe_kernels.contents import adapter_of, check_within_reach, digest_of_base, parts_of
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.distributed import by_one_process, fill, gathered, how_distributed, together
from lmoe_kernels.layer import LMoELinear, features_of, weight_of
from lmoe_kernels.model import replace_modules, wrapped
from lmoe_kernels.naming import plain_modules
from lmoe_kernels.targets import lmoe_layers_by_every_name, saved_modules, wrappable_layers

_Directory = str | os.PathLike[str]


def save_lmoe(model: nn.Module, directory: _Directory) -> None:
    """Write what was trained of a model, without the frozen layers, to `lmoe.safetensors` and `lmoe_config.json`.

    The directory is made where there is none. Names are those of the plain model, whatever wraps it or its parts. Sharded
    parameters (FSDP1's and FSDP2's) are gathered: call it on every process; the first one writes. Where every process holds
    the whole model, any number of them may call it for one place.

    Args:
        model: with L-MoE layers, plain or wrapped (torch.compile, activation checkpointing, DDP, FSDP, PEFT).
        directory: where to write.

    Raises:
        ValueError: the model has no L-MoE layers, or one of them lies on the meta device.
        ImportError: safetensors is not installed.
    """
    safetensors("save_lmoe")
    adapter = adapter_of("save_lmoe", model)
    by_one_process("save_lmoe", model, lambda: write_adapter(directory, adapter))


def load_lmoe(
    model: nn.Module,
    directory: _Directory | Iterable[_Directory],
    *,
    backend: BackendName | None = None,
    output_router_logits: bool = False,
) -> list[str]:
    """Give a model the L-MoE layers that `save_lmoe` wrote: layers that it lacks are made, those that it has are filled.

    Where layers are made in a model that has none, everything else is frozen, as by `apply_lmoe`. Experts that were saved
    in fp32 stay so (master weights); others take the dtype of the layer that they stand beside. Everything is checked
    before anything is changed: after an error the model is as it was.

    Args:
        model: the model that was saved, with or without its L-MoE layers, plain or wrapped. To a distributed model no
            layers can be added: load first, or fill layers that it has.
        directory: where `save_lmoe` wrote; or several of these, each for layers of its own.
        backend, output_router_logits: of the layers that are made, see `LMoELinear`.

    Returns:
        the names of the layers in the plain model.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: `directory` is no path, nor several.
        ImportError: safetensors is not installed.
        ValueError: a file is not what `save_lmoe` writes, or is another model's; a layer or tensor is missing, foreign or
            misshapen; two directories name one layer; a layer is on the meta device.
    """
    directories = _paths(directory)
    adapter = together("load_lmoe", model, lambda: _merged(model, directories))
    check_within_reach("load_lmoe", model)
    present = lmoe_layers_by_every_name(model)
    named = {id(present[name]) for name in adapter.layers if name in present}
    for name, layer in present.items():
        if id(layer) not in named:
            got = f"{len(adapter.layers)} other layers (several directories may be given)"
            _fail("directory", f"hold the model's L-MoE layer {name!r}", got)
    linears, trained_whole = wrappable_layers(model), saved_modules(model)
    made = [name for name in adapter.layers if name not in present]
    unprepared = made or [name for name in adapter.modules_to_save if name not in trained_whole]
    if unprepared and (how := how_distributed(model)) is not None:
        _fail("model", f"get {unprepared[0]!r} before it is distributed", f"one {how}")
    configs = {
        name: _config(name, options)._replace(backend=backend, output_router_logits=output_router_logits)
        for name, options in adapter.layers.items()
    }
    for name, config in configs.items():
        _check_layer(name, config, present.get(name), linears, adapter)
    saved, keys = _check_modules(model, adapter)
    of_layers = {name: list(config.shapes(0, 0)) for name, config in configs.items()}
    _check_keys(adapter, keys | {f"{name}.{key}" for name, own in of_layers.items() for key in own})
    _check_shared(adapter, of_layers, present | linears)

    layers = {name: present[name] for name in adapter.layers if name in present}
    layers |= wrapped(
        {name: linears[name] for name in made},
        lambda name: (configs[name], _dtype(adapter.tensors[f"{name}.lora_a"], linears[name])),
    )
    fill(model, {**layers, **parts_of(saved)}, adapter.tensors)
    new = {id(linears[name]): layers[name] for name in made}
    aliases = {name: new[id(linear)] for name, linear in linears.items() if id(linear) in new}
    replace_modules(model, aliases, adapter.modules_to_save)
    return list(adapter.layers)


def _paths(directory: Any) -> list[Path]:
    """One directory or several, as a list."""
    several = [directory]
    if isinstance(directory, Iterable) and not isinstance(directory, str | os.PathLike):
        several = list(directory)
    if not all(isinstance(one, str | os.PathLike) for one in several):
        checks.fail("load_lmoe", "directory", "be a path or several", repr(directory), TypeError)
    return [Path(one) for one in several]


def _merged(model: nn.Module, directories: list[Path]) -> Adapter:
    """What the directories hold together, each for layers of its own, all of this model."""
    if not directories:
        _fail("directory", "be one or several", "none")
    adapters = [read_adapter("load_lmoe", directory) for directory in directories]
    merged = Adapter({}, {}, [], None)
    for directory, adapter in zip(directories, adapters, strict=True):
        # the layers' own checks say more where a layer is missing or misshapen: the digest tells what they cannot see
        if adapter.base is not None and adapter.base != digest_of_base(model):
            known = plain_modules(model)
            foreign = next((name for name in adapter.layers if name not in known), None)
            got = "a model of other linear layers" if foreign is None else f"a model without its layer {foreign!r}"
            _fail("model", f"have the linear layers of the one that was saved to {directory}", got)
        for name in [*adapter.layers, *adapter.modules_to_save]:
            if name in merged.layers or name in merged.modules_to_save:
                _fail(f"layer {name!r}", "come from one directory", f"two, the second {directory}")
        merged.layers.update(adapter.layers)
        merged.tensors.update(adapter.tensors)
        merged.modules_to_save.extend(adapter.modules_to_save)
    return merged


def _config(name: str, options: dict[str, Any]) -> LayerConfig:
    if options.keys() != set(CONFIG_KEYS):
        _fail(f"layer {name!r}", f"have the options {sorted(CONFIG_KEYS)}", sorted(options))
    return LayerConfig(**options)


def _check_layer(
    name: str, config: LayerConfig, present: LMoELinear | None, linears: Mapping[str, nn.Module], adapter: Adapter
) -> None:
    """Whether the layer can be made or filled: its options, the shapes of its tensors, the layer that it is to wrap."""
    where = f"layer {name!r}"
    if present is None and name not in linears:
        _fail(where, "be a linear layer of the model", "none of that name")
    if present is not None and present.config() != adapter.layers[name]:
        _fail(where, f"have the model's options {present.config()}", adapter.layers[name])
    in_features, out_features = features_of(linears[name] if present is None else present) or (0, 0)
    try:
        checks.check_finite("LMoELinear", "alpha", config.alpha, "be a finite number")
        config.check()
        for key, shape in config.shapes(in_features, out_features).items():
            _check_tensor(f"{name}.{key}", adapter.tensors, shape)
    except (ValueError, TypeError) as error:
        raise ValueError(str(error).replace("LMoELinear:", f"load_lmoe: {where}:")) from None
    if (weight_of(linears[name]) if present is None else present.lora_a).is_meta:
        _fail(where, "hold numbers (see torch.nn.Module.to_empty)", "one on the meta device")


def _check_tensor(key: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    if key not in tensors:
        _fail(WEIGHTS, "hold the tensors of the layers, no more and no less", f"1 missing: {key!r}")
    if tensors[key].shape != shape:
        _fail(f"tensor {key!r}", f"have shape {shape}", tuple(tensors[key].shape))
    if tensors[key].dtype not in checks.DTYPES:
        _fail(f"tensor {key!r}", f"have a dtype of {', '.join(map(str, checks.DTYPES))}", tensors[key].dtype)


def _check_modules(model: nn.Module, adapter: Adapter) -> tuple[dict[str, nn.Module], set[str]]:
    """The modules of modules_to_save, by name, and the keys of their tensors: all there, of the model's shapes."""
    known = plain_modules(model)
    if unknown := next((name for name in adapter.modules_to_save if name not in known), None):
        _fail(f"module {unknown!r}", "be one of the model", "none of that name")
    modules = {name: known[name] for name in adapter.modules_to_save}
    tensors = gathered(model, parts_of(modules))
    for key, tensor in tensors.items():
        if key not in adapter.tensors:
            _fail(WEIGHTS, "hold the tensors of modules_to_save", f"1 missing: {key!r}")
        if adapter.tensors[key].shape != tensor.shape:
            _fail(f"tensor {key!r}", f"have shape {tuple(tensor.shape)}", tuple(adapter.tensors[key].shape))
    return modules, set(tensors)


def _check_keys(adapter: Adapter, known: set[str]) -> None:
    """No tensor may be without a layer or module that it is for."""
    foreign = sorted(adapter.tensors.keys() - known)
    if foreign:
        shown = ", ".join(map(repr, foreign[:3])) + (", ..." if len(foreign) > 3 else "")
        _fail(WEIGHTS, "hold the tensors of the layers, no more and no less", f"{len(foreign)} foreign: {shown}")


def _check_shared(adapter: Adapter, keys: Mapping[str, list[str]], modules: Mapping[str, nn.Module]) -> None:
    """Two layers of the checkpoint that are one in this model must be equal: else one of them would be lost."""
    first: dict[int, str] = {}
    for name in adapter.layers:
        other = first.setdefault(id(modules[name]), name)
        same = keys[name] == keys[other] and all(
            torch.equal(adapter.tensors[f"{name}.{key}"], adapter.tensors[f"{other}.{key}"]) for key in keys[name]
        )
        if not same:
            _fail("model", f"have two layers {other!r} and {name!r}", "one that is shared, for two sets of experts")


def _dtype(saved: Tensor, linear: nn.Module) -> torch.dtype:
    """What new experts are in: fp32 where they were saved so, or stand beside a quantised layer; else as that layer is."""
    dtype = weight_of(linear).dtype
    return torch.float32 if saved.dtype == torch.float32 or dtype not in checks.DTYPES else dtype


def _fail(argument: str, must: str, got: object) -> NoReturn:
    checks.fail("load_lmoe", argument, must, got)
