"""What a transformers model gets with its L-MoE layers: a `save_pretrained` that loses nothing, and training if quantised.

transformers matches tensors by name, and a wrapped layer has another name than the plain model's: its weight would be
written where `from_pretrained` does not find it, and drawn anew. So the tensors go under the plain model's names.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.adapter import WEIGHTS, write_adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.contents import adapter_of
from lmoe_kernels.naming import plain_key
from lmoe_kernels.targets import lmoe_layers

_METHOD = "save_pretrained"
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
        tensors = self.model.state_dict() if state_dict is None else state_dict
        adapter = adapter_of(_METHOD, self.model, tensors)
        result = None
        if not quantised:
            own = getattr(type(self.model), _METHOD)
            plain = plain_state_dict(self.model, tensors)
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
    """Let this model, if it is transformers', be trained if quantised, and save itself so that it can be restored."""
    if isinstance(model.__dict__.get(_METHOD), PretrainedSaver):
        return
    if callable(getattr(type(model), _METHOD, None)) and hasattr(model, "config"):
        setattr(model, _METHOD, PretrainedSaver(model))
        quantizer: Any = _quantizer_of(model)
        if quantizer is not None and not getattr(quantizer, "is_qat_trainable", False):
            model.hf_quantizer = _trainable(type(quantizer), vars(quantizer))


def restore(model: nn.Module) -> None:
    """Give the model its class's own `save_pretrained` back, and its own quantizer."""
    saver = model.__dict__.pop(_METHOD, None)
    if isinstance(saver, PretrainedSaver) and saver.quantizer is not None:
        model.hf_quantizer = saver.quantizer


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
