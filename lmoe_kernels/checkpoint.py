"""Save and load the experts and gates of a model: tensors as safetensors, options as JSON, never code."""

import json
import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.layer import CONFIG_KEYS, LMoELinear, weight_of
from lmoe_kernels.model import replace_modules
from lmoe_kernels.naming import unwrapped
from lmoe_kernels.targets import lmoe_layers, wrappable_layers

WEIGHTS, CONFIG = "lmoe.safetensors", "lmoe_config.json"
FORMAT = "lmoe_kernels"
FORMAT_VERSION = 1


def save_lmoe(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the L-MoE layers of a model, without the frozen layers, to `lmoe.safetensors` and `lmoe_config.json`.

    The directory is made where there is none. Each file is complete or not there: it takes its name when it is written, so
    several processes may save the same model to one place. Sharded parameters (FSDP2's) are gathered: call it on every rank.

    Args:
        model: with L-MoE layers; what torch.compile or DistributedDataParallel makes of one is saved under its own names.
        directory: where to write.
    Raises:
        ValueError: the model has no L-MoE layers. ImportError: safetensors is not installed.
    """
    save_file = _safetensors("save_lmoe").save_file
    layers = lmoe_layers(unwrapped(model))
    if not layers:
        checks.fail("save_lmoe", "model", "have L-MoE layers (see apply_lmoe)", "none")
    tensors = {key: _gathered(parameter.detach()).contiguous() for key, parameter in _parameters(layers).items()}
    configs = {name: layer.config() for name, layer in layers.items()}
    config = {"format": FORMAT, "version": FORMAT_VERSION, "layers": configs}

    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".lmoe-", dir=target) as partial:
        save_file(tensors, Path(partial, WEIGHTS), metadata={"format": "pt"})
        Path(partial, CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in (WEIGHTS, CONFIG):
            Path(partial, file).replace(target / file)


def load_lmoe(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    backend: str | None = None,
    output_router_logits: bool = False,
) -> list[str]:
    """Give a model the L-MoE layers that `save_lmoe` wrote: layers that it lacks are made, those that it has are filled.

    Where layers are made, everything but experts and gates is frozen, as by `apply_lmoe`. Experts that were saved in fp32
    stay so (master weights); others take the dtype of the layer that they stand beside. Everything is checked before
    anything is changed: after an error the model is as it was.

    Args:
        model: the model that was saved, with or without its L-MoE layers.
        directory: where `save_lmoe` wrote.
        backend, output_router_logits: of the layers that are made, see `LMoELinear`.
    Returns:
        the names of the layers.
    Raises:
        FileNotFoundError: a file is missing. ImportError: safetensors is not installed.
        ValueError: a file is not what `save_lmoe` writes; a layer or tensor is missing, foreign or misshapen; a layer is on
            the meta device.
    """
    source, model = Path(directory), unwrapped(model)
    configs = _read_config(source / CONFIG)
    tensors = _read_tensors(source / WEIGHTS)
    options = {"backend": backend, "output_router_logits": output_router_logits}
    present = lmoe_layers(model)
    missing = sorted(present.keys() - configs.keys())
    if missing:
        _fail(CONFIG, f"name the model's L-MoE layer {missing[0]!r}", f"{len(configs)} other layers")
    linears = wrappable_layers(model)
    plans = {name: present.get(name) or _plan(name, linears, config, options) for name, config in configs.items()}
    for name, plan in plans.items():
        if plan.config() != configs[name]:
            _fail(f"layer {name!r}", f"have the model's options {plan.config()}", configs[name])
        if (present[name].lora_a if name in present else weight_of(linears[name])).is_meta:
            _fail(f"layer {name!r}", "hold numbers (see torch.nn.Module.to_empty)", "one on the meta device")
    _check_tensors(plans, tensors)

    made: dict[int, LMoELinear] = {}
    for name, config in configs.items():
        if name not in present:
            dtype = torch.float32 if tensors[f"{name}.lora_a"].dtype == torch.float32 else None
            plans[name] = made[id(linears[name])] = LMoELinear.from_linear(linears[name], dtype, **config, **options)
    for key, parameter in _parameters(plans).items():
        parameter.data.copy_(_sharded_as(parameter, tensors[key]))
    if made:
        replace_modules(model, {name: made[id(linear)] for name, linear in linears.items() if id(linear) in made})
    return list(configs)


def _gathered(tensor: Any) -> Tensor:
    """All of a tensor, where it is sharded over processes (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded_as(parameter: Any, tensor: Tensor) -> Tensor:
    """A tensor as the parameter that it is copied to is sharded."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # here: few models are sharded, and the import is slow

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """The options of every layer."""
    _must_exist(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        _fail(f"{path}", "be JSON", error)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        _fail(f"{path}", f"say format {FORMAT!r}", repr(config.get("format") if isinstance(config, dict) else config))
    if config.get("version") != FORMAT_VERSION:
        _fail(f"{path}", f"be of version {FORMAT_VERSION}", config.get("version"))
    layers = config.get("layers")
    if not isinstance(layers, dict) or not layers or not all(isinstance(c, dict) for c in layers.values()):
        _fail(f"{path}", "map layers to their options", repr(layers))
    return layers


def _read_tensors(path: Path) -> dict[str, Tensor]:
    _must_exist(path)
    library = _safetensors("load_lmoe")
    try:
        return library.load_file(path)
    except Exception as error:  # safetensors raises its own SafetensorError, which it does not export everywhere
        _fail(f"{path}", "be a safetensors file", error)


def _plan(name: str, linears: dict[str, nn.Module], config: dict[str, Any], options: dict[str, Any]) -> LMoELinear:
    """The layer that the checkpoint describes, without memory: to see whether it can be made, and of which shapes."""
    if name not in linears:
        _fail(f"layer {name!r}", "be a linear layer of the model", "none of that name")
    if config.keys() != set(CONFIG_KEYS):
        _fail(f"layer {name!r}", f"have the options {sorted(CONFIG_KEYS)}", sorted(config))
    linear: Any = linears[name]
    return LMoELinear(linear.in_features, linear.out_features, bias=False, device="meta", **config, **options)


def _parameters(layers: dict[str, LMoELinear]) -> dict[str, nn.Parameter]:
    """Experts and gates by their keys in the checkpoint."""
    return {f"{name}.{key}": p for name, layer in layers.items() for key, p in layer.named_parameters(recurse=False)}


def _check_tensors(layers: dict[str, LMoELinear], tensors: dict[str, Tensor]) -> None:
    parameters = _parameters(layers)
    for what, keys in (("missing", parameters.keys() - tensors.keys()), ("foreign", tensors.keys() - parameters.keys())):
        if keys:
            shown = ", ".join(map(repr, sorted(keys)[:3])) + (", ..." if len(keys) > 3 else "")
            _fail(WEIGHTS, "hold the tensors of the layers, no more and no less", f"{len(keys)} {what}: {shown}")
    for key, parameter in parameters.items():
        if tensors[key].shape != parameter.shape:
            _fail(f"tensor {key!r}", f"have shape {tuple(parameter.shape)}", tuple(tensors[key].shape))
        if tensors[key].dtype not in checks.DTYPES:
            _fail(f"tensor {key!r}", f"have a dtype of {', '.join(map(str, checks.DTYPES))}", tensors[key].dtype)


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"load_lmoe: {path} does not exist")


def _fail(argument: str, must: str, got: object) -> NoReturn:
    checks.fail("load_lmoe", argument, must, got)


def _safetensors(op: str) -> ModuleType:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"{op}: safetensors must be installed: pip install safetensors") from error
