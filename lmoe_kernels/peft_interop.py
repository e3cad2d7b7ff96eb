# SPDX-License-Identifier: Apache-2.0
"""Makes a PEFT model save and load its L-MoE layers.

PEFT's `save_pretrained` and `load_adapter` handle only what PEFT itself added. A Trainer saves and resumes a PEFT model with
these two methods, so experts and gates would be lost.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.adapter import WEIGHTS, read_adapter, write_adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.contents import adapter_of, parts_of, with_routers
from lmoe_kernels.distributed import fill, gathered
from lmoe_kernels.naming import actual_names, is_of_peft
from lmoe_kernels.targets import lmoe_layers, saved_modules

_SAVE, _LOAD = "save_pretrained", "load_adapter"


def is_peft_model(module: nn.Module) -> bool:
    """Whether the module was returned by `peft.get_peft_model`."""
    return is_of_peft(module) and "base_model" in module._modules


def install(model: nn.Module) -> None:
    """Make this PEFT model save and load experts and gates in addition to its adapters."""
    model.__dict__ |= {_SAVE: partial(_save, model), _LOAD: partial(_load, model)}


def restore(model: nn.Module) -> None:
    """Restore the methods of the PEFT model's class."""
    for name in (_SAVE, _LOAD):
        vars(model).pop(name, None)


def _save(
    model: Any,
    save_directory: str | os.PathLike[str],
    *args: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """Call PEFT's `save_pretrained`, and write experts and gates to the same directory."""
    adapter = None
    if lmoe_layers(model):
        adapter = adapter_of(_SAVE, model, None if state_dict is None else _under_plain_names(model, state_dict))
    original = getattr(type(model), _SAVE)
    result = original(model, save_directory, *args, is_main_process=is_main_process, state_dict=state_dict, **options)
    if is_main_process and adapter is not None:
        write_adapter(save_directory, adapter)
    return result


def _load(model: Any, model_id: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
    """Call PEFT's `load_adapter`, which a Trainer uses to resume, and load experts and gates from the same directory."""
    original, layers = getattr(type(model), _LOAD), lmoe_layers(model)
    if not layers or not Path(model_id, WEIGHTS).is_file():
        return original(model, model_id, *args, **options)
    adapter = read_adapter(_LOAD, model_id)
    parts = {**with_routers(layers), **parts_of(saved_modules(model))}
    shapes = {key: tensor.shape for key, tensor in gathered(model, parts).items()}
    same_options = adapter.layers == {name: layer.config() for name, layer in layers.items()}
    if not same_options or shapes != {key: tensor.shape for key, tensor in adapter.tensors.items()}:
        fail(_LOAD, "model", f"have the L-MoE layers that were saved to {model_id}", "others")
    result = original(model, model_id, *args, **options)
    fill(model, parts, adapter.tensors)
    return result


def _under_plain_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names in the plain model, without those of modules that the model does not have."""
    plain = {actual: name for name, actual in actual_names(model).items()}
    split = {key: key.rpartition(".") for key in state_dict}
    return {f"{plain[owner]}.{leaf}": state_dict[key] for key, (owner, _, leaf) in split.items() if owner in plain}
