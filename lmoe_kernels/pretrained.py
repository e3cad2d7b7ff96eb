"""What a transformers model gets with its L-MoE layers: a `save_pretrained` that loses nothing, and training if quantised.

transformers matches tensors by name, and a wrapped layer has another name than the plain model's: its weight would be
written where `from_pretrained` does not find it, and drawn anew. So the tensors go under the plain model's names.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.adapter import WEIGHTS, read_adapter, write_adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.contents import adapter_of, places_of_layer, places_of_module
from lmoe_kernels.distributed import fill
from lmoe_kernels.naming import actual_names, plain_key, wrapped_child
from lmoe_kernels.targets import lmoe_layers, saved_modules

_METHOD, _LOAD = "save_pretrained", "load_adapter"
_INDEX, _CONFIG = "model.safetensors.index.json", "config.json"
_NO_WEIGHTS = "the base is not here: load it as before training, then lmoe_kernels.load_lmoe(model, this directory)"


class PretrainedSaver:
    """What a model with L-MoE layers has as `save_pretrained`: its class's own, on a state_dict of the plain model's names.

    The directory then holds the base under its own names, with the experts' tensors among them (a Trainer resumes from
    these; `from_pretrained` lists them as unexpected), and `lmoe.safetensors` and `lmoe_config.json` for `load_lmoe`.

    Of a quantised model, whose base does not change in training, the adapter alone is written, as PEFT does. A Trainer
    resumes from it in a model that has its L-MoE layers (and lists the base's tensors as missing); `from_pretrained` of
    the directory, which would draw the base anew, raises an error that says how to load it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.quantizer = _quantizer_of(model)  # the model's own, which `restore` gives back
        self.hook = model.register_load_state_dict_pre_hook(_find_compiled_parts)

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Write the model; the arguments are those of transformers."""
        quantised = self.quantizer is not None
        if quantised and options.get("push_to_hub"):
            fail(_METHOD, "push_to_hub", "be False for a quantised model, of which the adapter alone is saved", True)
        if state_dict is None and not quantised:
            state_dict = self.model.state_dict()
        adapter = adapter_of(_METHOD, self.model, state_dict)
        result = None
        if state_dict is not None and not quantised:
            own = getattr(type(self.model), _METHOD)
            plain = plain_state_dict(self.model, state_dict)
            result = own(self.model, save_directory, *args, is_main_process=is_main_process, state_dict=plain, **options)
        if is_main_process:
            write_adapter(save_directory, adapter)
            if quantised:
                self._write_what_trainer_reads(Path(save_directory), adapter.tensors)
        return result

    def _write_what_trainer_reads(self, directory: Path, keys: Iterable[str]) -> None:
        """The index by which Trainer finds the tensors, and a configuration that names no file of weights.

        transformers shows that name in its error. Where another configuration is given, it stops at the index, which has no
        metadata.
        """
        index = {"weight_map": dict.fromkeys(keys, WEIGHTS)}
        config = {**json.loads(self.model.config.to_json_string()), "transformers_weights": _NO_WEIGHTS}
        for name, content in ((_INDEX, index), (_CONFIG, config)):
            Path(directory, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def install(model: nn.Module) -> None:
    """Let a transformers model and PEFT's around it save the experts too, and a quantised one be trained."""
    for part in _around(model):
        if _METHOD in vars(part) or not callable(getattr(type(part), _METHOD, None)):
            continue
        if "base_model" in part._modules:  # PEFT's
            part.__dict__ |= {_METHOD: partial(_save_beside_peft, part), _LOAD: partial(_load_beside_peft, part)}
        elif hasattr(part, "config"):
            setattr(part, _METHOD, PretrainedSaver(part))
            quantizer: Any = _quantizer_of(part)
            if quantizer is not None and not getattr(quantizer, "is_qat_trainable", False):
                part.hf_quantizer = _trainable(type(quantizer), vars(quantizer))


def restore(model: nn.Module) -> None:
    """Give the model its classes' own methods back, and its own quantizer."""
    for part in _around(model):
        saver = vars(part).get(_METHOD)
        if isinstance(saver, PretrainedSaver):
            saver.hook.remove()
            if saver.quantizer is not None:
                part.hf_quantizer = saver.quantizer
        for name in (_METHOD, _LOAD):
            vars(part).pop(name, None)


def _around(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what it is wrapped around as a whole, down to the plain model."""
    yield model
    while (name := wrapped_child(model)) is not None:
        model = model.get_submodule(name)
        yield model


def _save_beside_peft(
    model: Any,
    save_directory: str | os.PathLike[str],
    *args: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Any:
    """PEFT's `save_pretrained`, which writes what PEFT knows; experts and gates go beside it."""
    plain = None if state_dict is None else _under_plain_names(model, state_dict)
    adapter = adapter_of(_METHOD, model, plain)
    own = getattr(type(model), _METHOD)
    result = own(model, save_directory, *args, is_main_process=is_main_process, state_dict=state_dict, **options)
    if is_main_process:
        write_adapter(save_directory, adapter)
    return result


def _load_beside_peft(model: Any, directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
    """PEFT's `load_adapter`, by which a Trainer resumes; experts and gates that lie beside are filled in."""
    own = getattr(type(model), _LOAD)
    if not Path(directory, WEIGHTS).is_file():
        return own(model, directory, *args, **options)
    beside, layers, saved = read_adapter(_LOAD, directory), lmoe_layers(model), saved_modules(model)
    shapes = {f"{name}.{key}": shape for name, layer in layers.items() for key, shape in layer.shapes().items()}
    places = {key: place for name, layer in layers.items() for key, place in places_of_layer(name, layer).items()}
    places |= {key: place for name, module in saved.items() for key, place in places_of_module(name, module).items()}
    if (
        beside.layers != {name: layer.config() for name, layer in layers.items()}
        or beside.tensors.keys() != places.keys()
        or any(tuple(beside.tensors[key].shape) != shape for key, shape in shapes.items())
    ):
        fail(_LOAD, "model", f"have the L-MoE layers that were saved to {directory}", "others")
    result = own(model, directory, *args, **options)
    fill(model, places, beside.tensors)
    return result


def _under_plain_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the modules that the model has, PEFT's segments taken out of the keys."""
    plain = {actual: name for name, actual in actual_names(model).items()}
    split = {key: key.rpartition(".") for key in state_dict}
    return {f"{plain[owner]}.{leaf}": state_dict[key] for key, (owner, _, leaf) in split.items() if owner in plain}


def _find_compiled_parts(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before tensors of a plain model's names are loaded: torch.compile leaves its segment in the names below a part."""
    for name, part in model.named_modules():
        if name and "_orig_mod" in part._modules:
            above = f"{prefix}{_without_hooks_of_their_own(name)}."
            below = f"{above}_orig_mod."
            for key in [key for key in state_dict if key.startswith(above) and not key.startswith(below)]:
                state_dict[below + key.removeprefix(above)] = state_dict.pop(key)


def _without_hooks_of_their_own(name: str) -> str:
    """Activation checkpointing and FSDP put their segments into the keys themselves."""
    return ".".join(part for part in name.split(".") if part not in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module"))


class _Trainable:
    """In front of a quantizer's class: Trainer refuses a quantised model unless PEFT is on it, or its quantizer says this.

    Whether a method of quantisation lets gradients through, `is_trainable`, the class still tells itself.
    """

    is_qat_trainable = True

    def __reduce__(self) -> tuple[Any, ...]:
        """The class has no name by which pickle would find it."""
        return _trainable, (type(self).__bases__[1], vars(self))


def _trainable(quantizer_class: type, state: dict[str, Any]) -> Any:
    """A quantizer of this class and state that says so."""
    quantizer = object.__new__(type(quantizer_class.__name__, (_Trainable, quantizer_class), {}))
    vars(quantizer).update(state)
    return quantizer


def plain_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state_dict under the names of the plain model; those of experts and gates under the layer's."""
    frozen = {f"{name}.frozen_layer.": f"{name}." for name in lmoe_layers(model)}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = plain_key(key)
        before = next((prefix for prefix in frozen if plain.startswith(prefix)), None)
        renamed[plain if before is None else frozen[before] + plain.removeprefix(before)] = tensor
    return renamed


def _quantizer_of(model: nn.Module) -> Any:
    return getattr(model, "hf_quantizer", None)
