"""Models whose parameters lie on several processes: which they are, what cannot be done with them, whole tensors to and fro.

FSDP2 (`fully_shard`) makes parameters DTensors, each of which is gathered by itself. FSDP1 flattens those of a unit into one
tensor: they are whole only while the unit is summoned.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

Result = TypeVar("Result")
Parts = Mapping[str, nn.Module]  # by name; of each its own parameters and buffers are meant, not its children's


def how_distributed(model: nn.Module) -> str | None:
    """What keeps the parameters of this model equal on all processes, and would not keep others; None for a plain one."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return "in DistributedDataParallel, which knows the parameters that it began with"
    if _fsdp1_units(model) or is_cut_out(model):
        return "in FullyShardedDataParallel, which knows the parameters that it began with"
    if any(map(_is_dtensor, model.parameters())):
        return "of which some parameters are sharded already (by fully_shard or tensor parallelism)"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds the whole model, so that every process must take part in gathering it."""
    return bool(_fsdp1_units(model)) or any(map(_is_dtensor, model.parameters()))


def is_cut_out(model: nn.Module) -> bool:
    """Whether the model was taken out of an FSDP1 unit that holds its parameters and alone can make them whole."""
    inside = {id(module) for unit in _fsdp1_units(model) for module in unit.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    return any(hasattr(p, "_fsdp_flattened") for module in outside for p in module._parameters.values())


def gathered(model: nn.Module, parts: Parts) -> dict[str, Tensor]:
    """Whole copies of the tensors of these modules, on every process. Of a sharded model all processes must call this."""
    whole: dict[str, Tensor] = {}

    def take(key: str, tensor: Any) -> None:
        tensor = tensor.full_tensor() if _is_dtensor(tensor) else tensor
        whole[key] = tensor.detach().clone()  # what FSDP1 summons is gone afterwards

    _visit(model, parts, take, writeback=False)
    return whole


def fill(model: nn.Module, parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into these modules, each process its part; what is not among them stays."""

    def put(key: str, tensor: Any) -> None:
        if key not in tensors:
            return
        source = tensors[key]
        if _is_dtensor(tensor):
            from torch.distributed.tensor import distribute_tensor  # few models are sharded, and the import is slow

            source = distribute_tensor(source.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
        tensor.data.copy_(source)

    _visit(model, parts, put, writeback=True)


def together(op: str, model: nn.Module, act: Callable[[], Result]) -> Result:
    """Run `act` on every process of a sharded model. Where it fails on one it raises on all, and none waits for another."""
    if not _is_shared_out(model):
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


def by_one_process(op: str, model: nn.Module, act: Callable[[], None]) -> None:
    """Run `act` on the first process of a sharded model while the others wait; where it fails it raises on all.

    Where every process holds a whole model (a plain one, data parallelism) each runs it: often only one calls at all.
    """
    first = not _is_shared_out(model) or distributed.get_rank() == 0
    together(op, model, act if first else lambda: None)


def _is_shared_out(model: nn.Module) -> bool:
    return is_sharded(model) and distributed.is_available() and distributed.is_initialized()


def _visit(model: nn.Module, parts: Parts, act: Callable[[str, Any], None], writeback: bool) -> None:
    """Call act(key, tensor) for every tensor of these modules, unit by unit of FSDP1: at most one is whole at a time."""
    units: list[Any] = _fsdp1_units(model)
    for unit in units:
        unit.check_is_root()  # outer ones first: what is summoned before it knows its root takes itself for one
    unit_of = {id(module): unit for unit in units for module in unit.modules() if module is not unit}
    with torch.no_grad():
        for unit in (None, *units):
            mine = {name: part for name, part in parts.items() if unit_of.get(id(part)) is unit}
            if not mine:
                continue
            with nullcontext() if unit is None else _summoned(unit, writeback):
                for name, part in mine.items():
                    for key, tensor in _tensors_of(part).items():
                        act(f"{name}.{key}", tensor)


def _tensors_of(module: nn.Module) -> dict[str, Any]:
    """What a module's state_dict holds, without its children."""
    buffers = {key: buffer for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: tensor for key, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def _summoned(unit: nn.Module, writeback: bool) -> AbstractContextManager[None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback)


def _fsdp1_units(model: nn.Module) -> list[nn.Module]:
    """FSDP1's units, outer ones first: of those around a module the last, the innermost, holds its parameters."""
    return [module for module in model.modules() if "_fsdp_wrapped_module" in module._modules]


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")
