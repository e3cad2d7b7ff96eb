# SPDX-License-Identifier: Apache-2.0
"""Saves and loads the trained part of a model: experts, gates and modules_to_save, under their names in the plain model."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.adapter import WEIGHTS, Adapter, read_adapter, write_adapter
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.contents import adapter_of, check_gatherable, digest_of_base, parts_of, with_routers
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.distributed import fill, gathered, how_distributed, run_on_all_processes, run_on_first_process
from lmoe_kernels.files import safetensors
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.linears import features_of, weight_of
from lmoe_kernels.model import replace_modules, wrap_linears
from lmoe_kernels.naming import plain_modules
from lmoe_kernels.reader import check_keys, check_layer, check_tensor, config_of
from lmoe_kernels.router_scopes import scopes_of
from lmoe_kernels.targets import lmoe_layers_by_every_name, saved_modules, wrappable_layers

_Directory = str | os.PathLike[str]


def save_lmoe(model: nn.Module, directory: _Directory) -> None:
    """Save the experts, the gates and modules_to_save of a model to `lmoe.safetensors` and `lmoe_config.json`.

    The frozen layers are not saved. Names are those of the plain model, also if the model or its modules are wrapped.
    If the model is sharded (FSDP1, FSDP2), call this function on every process: the parameters are gathered, and the first
    process writes. If every process has the whole model, any number of processes may write to the same directory.

    Args:
        model: a model with L-MoE layers, plain or wrapped (torch.compile, activation checkpointing, DDP, FSDP, PEFT).
        directory: the directory to write to. It is created if it does not exist.

    Raises:
        ValueError: the model has no L-MoE layers, one of its tensors is on the meta device, or the model is the module
            inside an FSDP1 wrapper.
        ImportError: safetensors is not installed.
    """
    safetensors("save_lmoe")
    adapter = adapter_of("save_lmoe", model)
    run_on_first_process("save_lmoe", model, lambda: write_adapter(directory, adapter))


def load_lmoe(
    model: nn.Module,
    directory: _Directory | Iterable[_Directory],
    *,
    backend: BackendName | None = None,
    output_router_logits: bool = False,
    dropout: float = 0.0,
    stack: bool = True,
) -> list[str]:
    """Load the L-MoE layers that `save_lmoe` wrote: create the layers that the model does not have, and fill the others.

    If the model has no L-MoE layers yet, everything else is frozen, as by `apply_lmoe`. Experts that were saved in fp32
    stay in fp32 (master weights); others get the dtype of the linear layer that they are added to. All checks come before
    the first change, so an error leaves the model unchanged.

    Args:
        model: the model that was saved, with or without its L-MoE layers, plain or wrapped. A distributed model (DDP,
            FSDP) must have the layers already: call `load_lmoe` or `apply_lmoe` before distributing it.
        directory: the directory that `save_lmoe` wrote to, or several of them, each with different layers.
        backend: backend of the layers that are created, see `LMoELinear`.
        output_router_logits: for the layers that are created, see `LMoELinear`.
        dropout: for the layers that are created, see `LMoELinear`.
        stack: whether layers that read the same input are computed together, see `apply_lmoe`.

    Returns:
        the names of the layers in the plain model.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: `directory` is neither a path nor several paths.
        ImportError: safetensors is not installed.
        ValueError: a file was not written by `save_lmoe` or belongs to another model; a layer or tensor is missing, unknown
            or has another shape; two directories contain the same layer; a layer is on the meta device.
    """
    directories = _paths(directory)
    checks.check_bool("load_lmoe", "stack", stack)
    adapter = run_on_all_processes("load_lmoe", model, lambda: _merged(model, directories))
    check_gatherable("load_lmoe", model)
    present = lmoe_layers_by_every_name(model)
    filled = {id(present[name]) for name in adapter.layers if name in present}
    for name, layer in present.items():
        if id(layer) not in filled:
            got = f"{len(adapter.layers)} other layers (several directories may be given)"
            _fail("directory", f"hold the model's L-MoE layer {name!r}", got)
    linears, already_saved = wrappable_layers(model), saved_modules(model)
    new_names = [name for name in adapter.layers if name not in present]
    to_prepare = new_names or [name for name in adapter.modules_to_save if name not in already_saved]
    if to_prepare and (how := how_distributed(model)) is not None:
        _fail("model", f"be prepared for {to_prepare[0]!r} (load_lmoe, apply_lmoe) before it is distributed", f"one {how}")
    configs = {
        name: config_of("load_lmoe", name, options)._replace(
            backend=backend, output_router_logits=output_router_logits, dropout=dropout
        )
        for name, options in adapter.layers.items()
    }
    for name, config in configs.items():
        _check_layer(name, config, present.get(name), linears, adapter)
    saved, keys = _check_modules(model, adapter)
    keys_of_layers = {name: list(config.shapes(0, 0)) for name, config in configs.items()}
    keys |= {f"{name}.{key}" for name, layer_keys in keys_of_layers.items() for key in layer_keys}
    check_keys("load_lmoe", adapter.tensors, keys | _check_routers(model, configs, adapter, present | linears))
    _check_shared(adapter, keys_of_layers, present | linears)

    layers = {name: present[name] for name in adapter.layers if name in present}
    layers |= wrap_linears(
        "load_lmoe",
        model,
        {name: linears[name] for name in new_names},
        lambda name: (configs[name], _dtype(adapter.tensors[f"{name}.lora_a"], linears[name])),
    )
    new = {id(linears[name]): layers[name] for name in new_names}
    aliases = {name: new[id(linear)] for name, linear in linears.items() if id(linear) in new}
    replace_modules(model, aliases, adapter.modules_to_save, stack=stack)
    fill(model, {**with_routers(layers), **parts_of(saved)}, adapter.tensors)
    return list(adapter.layers)


def _paths(directory: Any) -> list[Path]:
    """The directories as a list."""
    several = [directory]
    if isinstance(directory, Iterable) and not isinstance(directory, str | os.PathLike):
        several = list(directory)
    if not all(isinstance(one, str | os.PathLike) for one in several):
        checks.fail("load_lmoe", "directory", "be one path or several", repr(directory), TypeError)
    return [Path(one) for one in several]


def _merged(model: nn.Module, directories: list[Path]) -> Adapter:
    """Merge the contents of the directories. Each must contain different layers of this model."""
    if not directories:
        _fail("directory", "be one path or several", "none")
    adapters = [read_adapter("load_lmoe", directory) for directory in directories]
    merged = Adapter({}, {}, [], None)
    for directory, adapter in zip(directories, adapters, strict=True):
        # The digest covers all linear layers of the model; the later checks cover only those in the checkpoint.
        if adapter.base is not None and adapter.base != digest_of_base(model):
            known = plain_modules(model)
            unknown = next((name for name in adapter.layers if name not in known), None)
            got = "a model of other linear layers" if unknown is None else f"a model without its layer {unknown!r}"
            _fail("model", f"have the linear layers of the one that was saved to {directory}", got)
        for name in [*adapter.layers, *adapter.modules_to_save]:
            if name in merged.layers or name in merged.modules_to_save:
                _fail(f"layer {name!r}", "come from one directory", f"two, the second {directory}")
        merged.layers.update(adapter.layers)
        merged.tensors.update(adapter.tensors)
        merged.modules_to_save.extend(adapter.modules_to_save)
    return merged


def _check_layer(
    name: str, config: LayerConfig, present: LMoELinear | None, linears: Mapping[str, nn.Module], adapter: Adapter
) -> None:
    """Check that the layer can be created or filled: its options, the shapes of its tensors, the linear layer to wrap."""
    where = f"layer {name!r}"
    if present is None and name not in linears:
        _fail(where, "be a linear layer of the model", "none of that name")
    if present is not None:
        _check_experts(where, config, present)
    if present is not None and present.config() != adapter.layers[name]:
        _fail(where, f"have the model's options {present.config()}", adapter.layers[name])
    in_features, out_features = features_of(linears[name] if present is None else present) or (0, 0)
    check_layer("load_lmoe", name, config, (in_features, out_features), adapter.tensors)
    if (weight_of(linears[name]) if present is None else present.lora_a).is_meta:
        _fail(where, "have data (see torch.nn.Module.to_empty)", "one on the meta device")


def _check_routers(
    model: nn.Module, configs: Mapping[str, LayerConfig], adapter: Adapter, modules: Mapping[str, nn.Module]
) -> set[str]:
    """Check that the routers that layers share are there and fit. Return the keys of their tensors."""
    first_names: dict[int, str] = {}
    for name in plain_modules(model):
        if name in configs:
            first_names.setdefault(id(modules[name]), name)
    sizes = {name: (configs[name], (features_of(modules[name]) or (0, 0))[0]) for name in first_names.values()}
    keys: set[str] = set()
    for scope in scopes_of("load_lmoe", model, sizes):
        experts = scope.config.num_experts
        shapes: dict[str, tuple[int, ...]] = {"gate_weight": (experts, scope.features)}
        if scope.config.gate_bias:
            shapes["gate_bias"] = (experts,)
        for key, shape in shapes.items():
            check_tensor("load_lmoe", full := f"{scope.layers[0]}.router.{key}", adapter.tensors, shape)
            keys.add(full)
    return keys


def _check_experts(where: str, config: LayerConfig, present: LMoELinear) -> None:
    """Check that the layer has the experts of the checkpoint, if these are named or as many."""
    as_many = config.expert_names is None and config.num_experts == present.num_experts
    if (as_many or isinstance(config.expert_names, list)) and config.names() != present.expert_names:
        ours, theirs = (", ".join(map(repr, names)) for names in (present.expert_names, config.names()))
        _fail(where, f"have the model's experts {ours}", f"{theirs} (see add_expert, remove_expert)")


def _check_modules(model: nn.Module, adapter: Adapter) -> tuple[dict[str, nn.Module], set[str]]:
    """Check that every tensor of modules_to_save is present and has the model's shape. Return the modules and their keys."""
    known = plain_modules(model)
    if unknown := next((name for name in adapter.modules_to_save if name not in known), None):
        _fail(f"module {unknown!r}", "be a module of the model", "none of that name")
    modules = {name: known[name] for name in adapter.modules_to_save}
    tensors = gathered(model, parts_of(modules))
    for key, tensor in tensors.items():
        if key not in adapter.tensors:
            _fail(WEIGHTS, f"hold {key!r}", "none of that name")
        if adapter.tensors[key].shape != tensor.shape:
            _fail(f"tensor {key!r}", f"have shape {tuple(tensor.shape)}", tuple(adapter.tensors[key].shape))
    return modules, set(tensors)


def _check_shared(adapter: Adapter, keys: Mapping[str, list[str]], modules: Mapping[str, nn.Module]) -> None:
    """Check that layers of the checkpoint that are one shared layer in this model have equal tensors.

    Otherwise the tensors of one of them would be lost.
    """
    first: dict[int, str] = {}
    for name in adapter.layers:
        other = first.setdefault(id(modules[name]), name)
        same = keys[name] == keys[other] and all(
            torch.equal(adapter.tensors[f"{name}.{key}"], adapter.tensors[f"{other}.{key}"]) for key in keys[name]
        )
        if not same:
            _fail("model", f"have two layers {other!r} and {name!r}", "one shared layer for two different sets of experts")


def _dtype(saved: Tensor, linear: nn.Module) -> torch.dtype:
    """The dtype of new experts: fp32 if they were saved in fp32 or the linear layer is quantised, else that of the layer."""
    dtype = weight_of(linear).dtype
    return torch.float32 if saved.dtype == torch.float32 or dtype not in checks.DTYPES else dtype


def _fail(argument: str, must: str, got: object) -> NoReturn:
    checks.fail("load_lmoe", argument, must, got)
