# SPDX-License-Identifier: Apache-2.0
"""Composes LoRAs that were trained separately: each becomes one expert of a mixture."""

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.config import LayerConfig, RouterReads, RouterScope
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.distributed import how_distributed
from lmoe_kernels.linears import features_of, weight_of
from lmoe_kernels.lora_adapter import LoraAdapter, LoraLayer, check_fits, expert_of, read_lora
from lmoe_kernels.model import replace_modules, wrap_linears
from lmoe_kernels.targets import hint_for_layers, wrappable_layers

_OP = "from_lora_adapters"
_Directory = str | os.PathLike[str]


def from_lora_adapters(
    model: nn.Module,
    adapters: Mapping[str, _Directory] | Iterable[_Directory],
    *,
    rank: int | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    gate_bias: bool = True,
    choice_bias: bool = False,
    router: RouterScope = "layer",
    router_reads: RouterReads = "token",
    gate_init_std: float | None = None,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    output_router_logits: bool = False,
    backend: BackendName | None = None,
) -> list[str]:
    """Replace linear layers of a model by `LMoELinear` layers whose experts are LoRAs that PEFT has saved, one expert each.

    The layers mix the experts' outputs (mixing="outputs"): up to rounding, a gate of 1 gives what that LoRA gives in PEFT.
    LoRAs may have different ranks, scalings and layers. Smaller ranks are padded with zeros, which no gradient changes, and
    an expert is zero in layers that its LoRA does not have. Each scaling, alpha / r or with rsLoRA alpha / sqrt(r), becomes
    a factor of B, which is rounded once to the dtype of the experts; factors that are powers of two are exact. Everything
    else is frozen, as by `apply_lmoe`. An error leaves the model unchanged.

    Args:
        model: the model that the LoRAs were trained for, see `apply_lmoe`.
        adapters: directories with plain LoRAs by the names of the experts; or directories alone, whose last segments are the
            names. DoRA and other variants, and adapters with modules_to_save, are refused.
        rank: R, the rank of each expert, at least the largest of the LoRAs. None for the largest one in each layer.
        top_k: see `lmoe`.
        renormalize: see `lmoe`.
        gate_bias: whether the gates have a bias. It is initialised to zero.
        choice_bias: see `LMoELinear`.
        router: see `LMoELinear`. LoRAs that were trained apart compose best with "block" or "model".
        router_reads: see `LMoELinear`. LoRAs that were trained apart compose best with "prefix".
        gate_init_std: standard deviation of the gates' initial weights. None for 0: the gates are equal, and the LoRAs are
            averaged. With top_k None is 1 / sqrt(in_features), because equal logits would always choose the first experts.
        dtype: dtype of experts and gates, see `LMoELinear.from_linear`.
        dropout: see `LMoELinear`.
        output_router_logits: see `LMoELinear`.
        backend: see `lmoe`.

    Returns:
        the names of the layers, in the model's order.

    Raises:
        ValueError: a directory does not hold a plain LoRA, a LoRA does not fit the model, two experts have one name, an
            option does not fit, or the model is distributed (DDP, FSDP) or on the meta device.
        TypeError: an argument has the wrong type.
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.

    Example:
        from_lora_adapters(model, {"english": "loras/english", "python": "loras/python"})
    """
    directories = _named(adapters)
    if not isinstance(model, nn.Module):
        checks.fail(_OP, "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    if (how := how_distributed(model)) is not None:
        checks.fail(_OP, "model", "get its L-MoE layers before it is distributed", f"one {how}")
    config = LayerConfig(
        num_experts=len(directories),
        rank=1 if rank is None else rank,
        mixing="outputs",
        top_k=top_k,
        renormalize=renormalize,
        gate_bias=gate_bias,
        choice_bias=choice_bias,
        router=router,
        router_reads=router_reads,
        expert_names=list(directories),
        dropout=dropout,
        gate_init_std=(0.0 if top_k is None else None) if gate_init_std is None else gate_init_std,
        output_router_logits=output_router_logits,
        backend=backend,
    )
    return _replace_layers(model, directories, config, rank, dtype)


def _replace_layers(
    model: nn.Module,
    directories: Mapping[str, _Directory],
    config: LayerConfig,
    rank: int | None,
    dtype: torch.dtype | None,
) -> list[str]:
    """Read and check everything, and then replace the layers. Return their names."""
    config.check()
    loras = {name: read_lora(_OP, directory) for name, directory in directories.items()}
    _warn_of_other_bases(loras)
    linears = wrappable_layers(model)
    by_layer = _by_layer(model, directories, loras, linears)
    configs = {
        name: _of_rank(config, name, max(lora.a.shape[0] for lora in of_layer.values()), rank)
        for name, of_layer in by_layer.items()
    }
    layers = wrap_linears(_OP, model, {name: linears[name] for name in by_layer}, lambda name: (configs[name], dtype))
    for name, layer in layers.items():
        for index, expert in enumerate(directories):
            _fill(layer.lora_a.data[index], layer.lora_b.data[index], by_layer[name].get(expert))
    new = {id(linears[name]): layer for name, layer in layers.items()}
    replace_modules(model, {name: new[id(linear)] for name, linear in linears.items() if id(linear) in new})
    return list(layers)


def _named(adapters: Any) -> dict[str, _Directory]:
    """The directories by the names of the experts."""
    if isinstance(adapters, Mapping):
        named = dict(adapters)
    elif isinstance(adapters, Iterable) and not isinstance(adapters, str | os.PathLike):
        named = {}
        for directory in adapters:
            _check_path(directory)
            name = Path(os.path.abspath(directory)).name
            if name in named:
                got = f"two of the name {name!r}: pass a dict of names and directories"
                checks.fail(_OP, "adapters", "have different names", got)
            named[name] = directory
    else:
        checks.fail(_OP, "adapters", "be a dict or a list of directories", repr(adapters), TypeError)
    if not named:
        checks.fail(_OP, "adapters", "name at least one directory", "none")
    for directory in named.values():
        _check_path(directory)
    return named


def _check_path(directory: Any) -> None:
    if not isinstance(directory, str | os.PathLike):
        checks.fail(_OP, "adapters", "hold paths of directories", repr(directory), TypeError)


def _warn_of_other_bases(loras: Mapping[str, LoraAdapter]) -> None:
    """Warn if two adapters record different base models. It is no error, because a model may have several names."""
    bases = {adapter.base: expert for expert, adapter in loras.items() if adapter.base is not None}
    if len(bases) > 1:
        shown = ", ".join(f"{expert!r} for {base!r}" for base, expert in bases.items())
        warnings.warn(f"{_OP}: the adapters were trained for base models of different names: {shown}", stacklevel=4)


def _by_layer(
    model: nn.Module,
    directories: Mapping[str, _Directory],
    loras: Mapping[str, LoraAdapter],
    linears: Mapping[str, nn.Module],
) -> dict[str, dict[str, LoraLayer]]:
    """The LoRAs of each layer by the names of the experts, in the model's order. All must fit the model."""
    first_names: dict[int, str] = {}
    for name, linear in linears.items():
        first_names.setdefault(id(linear), name)
    by_layer: dict[str, dict[str, LoraLayer]] = {name: {} for name in first_names.values()}
    for expert, adapter in loras.items():
        for name, lora in adapter.layers.items():
            where = f"of layer {name!r} in {directories[expert]}"
            if name not in linears:
                must = f"have the layer {name!r} of the LoRA in {directories[expert]}"
                got = f"none that can be wrapped; {hint_for_layers(model, name, linears)}"
                checks.fail(_OP, "model", must, got)
            check_fits(_OP, where, lora, *(features_of(linears[name]) or (0, 0)))
            if weight_of(linears[name]).is_meta:
                checks.fail(_OP, "model", "have data (see torch.nn.Module.to_empty)", f"layer {name!r} on the meta device")
            of_layer = by_layer[first_names[id(linears[name])]]
            if expert in of_layer:
                got = "a second one, under another name of the layer"
                checks.fail(_OP, f"the LoRA {where}", "be the only one of its layer", got)
            of_layer[expert] = lora
    return {name: of_layer for name, of_layer in by_layer.items() if of_layer}


def _of_rank(config: LayerConfig, name: str, largest: int, rank: int | None) -> LayerConfig:
    """The options of a layer. Its alpha is its rank, so that its scaling is 1."""
    if rank is not None and largest > rank:
        checks.fail(_OP, "rank", f"be at least {largest}, the largest rank of the LoRAs of layer {name!r}", rank)
    used = largest if rank is None else rank
    return config._replace(rank=used, alpha=float(used))


def _fill(a: Tensor, b: Tensor, lora: LoraLayer | None) -> None:
    """Copy a LoRA into the A (R, I) and the B (R, O) of an expert. Without a LoRA they become zero."""
    if lora is None:
        a.zero_()  # B is zero from the start
        return
    of_lora = expert_of(lora, a.shape[0], 1.0, a.dtype)
    a.copy_(of_lora[0])
    b.copy_(of_lora[1])
