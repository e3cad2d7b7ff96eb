# SPDX-License-Identifier: Apache-2.0
"""Distributed models: recognises them, gathers whole tensors from them and copies whole tensors into them.

FSDP2 (`fully_shard`) turns parameters into DTensors, which are gathered one by one. FSDP1 flattens the parameters of a unit
into one tensor, so they exist as whole tensors only inside `summon_full_params`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

Result = TypeVar("Result")
Parts = Mapping[str, nn.Module]  # modules by name, each with its own parameters and buffers, without those of its children


def how_distributed(model: nn.Module) -> str | None:
    """How the model is distributed, as text for an error message; None if it is not.

    What synchronises the parameters of a distributed model would ignore parameters that are added later.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return "in DistributedDataParallel, which ignores parameters that are added later"
    if _fsdp1_units(model) or lacks_fsdp1_wrapper(model):
        return "in FullyShardedDataParallel, which ignores parameters that are added later"
    if any(map(_is_dtensor, model.parameters())):
        return "of which some parameters are already sharded (by fully_shard or tensor parallelism)"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are sharded, so that every process must take part in gathering them."""
    return bool(_fsdp1_units(model)) or any(map(_is_dtensor, model.parameters()))


def lacks_fsdp1_wrapper(model: nn.Module) -> bool:
    """Whether the model is the inside of an FSDP1 unit without the unit. Only the unit can gather the parameters."""
    inside = {id(module) for unit in _fsdp1_units(model) for module in unit.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    return any(hasattr(p, "_fsdp_flattened") for module in outside for p in module._parameters.values())


def gathered(model: nn.Module, parts: Parts) -> dict[str, Tensor]:
    """Whole copies of the tensors of these modules, on every process. All processes must call this for a sharded model."""
    whole: dict[str, Tensor] = {}

    def copy_out(key: str, tensor: Any) -> None:
        tensor = tensor.full_tensor() if _is_dtensor(tensor) else tensor
        whole[key] = tensor.detach().clone()  # FSDP1 frees its whole tensors on leaving summon_full_params

    _for_each_tensor(model, parts, copy_out, writeback=False)
    return whole


def fill(model: nn.Module, parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into these modules; each process keeps its shards. Tensors that are not given do not change."""

    def copy_in(key: str, tensor: Any) -> None:
        if key not in tensors:
            return
        source = tensors[key]
        if _is_dtensor(tensor):
            from torch.distributed.tensor import distribute_tensor  # a slow import that only sharded models need

            source = distribute_tensor(source.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
        tensor.data.copy_(source)

    _for_each_tensor(model, parts, copy_in, writeback=True)


def run_on_all_processes(op: str, model: nn.Module, act: Callable[[], Result]) -> Result:
    """Run `act` on every process of a sharded model. If it fails on one process, raise on all, so that none has to wait."""
    if not _needs_all_processes(model):
        return act()
    result: Any = None
    error: Exception | None = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    errors: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(errors, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise RuntimeError(f"{op}: process {rank} failed: {text}")
    return result


def run_on_first_process(op: str, model: nn.Module, act: Callable[[], None]) -> None:
    """Run `act` on the first process of a sharded model while the others wait. If it fails, raise on all processes.

    If every process has the whole model, each process that calls this runs `act`, because often only one calls it.
    """
    first = not _needs_all_processes(model) or distributed.get_rank() == 0
    run_on_all_processes(op, model, act if first else lambda: None)


def _needs_all_processes(model: nn.Module) -> bool:
    return is_sharded(model) and distributed.is_available() and distributed.is_initialized()


def _for_each_tensor(model: nn.Module, parts: Parts, act: Callable[[str, Any], None], writeback: bool) -> None:
    """Call act(key, tensor) for every tensor of these modules. At most one FSDP1 unit is gathered at a time."""
    units: list[Any] = _fsdp1_units(model)
    for unit in units:
        unit.check_is_root()  # outer units first: a unit that is gathered before its root is known becomes a root itself
    unit_of = {id(module): unit for unit in units for module in unit.modules() if module is not unit}
    with torch.no_grad():
        for unit in (None, *units):
            mine = {name: part for name, part in parts.items() if unit_of.get(id(part)) is unit}
            if not mine:
                continue
            with nullcontext() if unit is None else _full_parameters_of(unit, writeback):
                for name, part in mine.items():
                    for key, tensor in _tensors_of(part).items():
                        act(f"{name}.{key}", tensor)


def _tensors_of(module: nn.Module) -> dict[str, Any]:
    """The parameters and buffers in a module's state_dict, without those of its children."""
    buffers = {key: buffer for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: tensor for key, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def _full_parameters_of(unit: nn.Module, writeback: bool) -> AbstractContextManager[None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback)


def _fsdp1_units(model: nn.Module) -> list[nn.Module]:
    """The FSDP1 units of a model, outer units first. The parameters of a module belong to the innermost unit around it."""
    return [module for module in model.modules() if "_fsdp_wrapped_module" in module._modules]


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
