"""Saving through transformers: `save_pretrained` of a model with L-MoE layers writes the plain model and its adapter beside.

transformers matches tensors by name, and a wrapped layer has another name than the plain model's: its weight would be
written where `from_pretrained` does not find it, and drawn anew. So the tensors go under the plain model's names.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.adapter import write_adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.contents import adapter_of
from lmoe_kernels.naming import plain_key
from lmoe_kernels.targets import lmoe_layers

_METHOD = "save_pretrained"


class PretrainedSaver:
    """What a model with L-MoE layers has as `save_pretrained`: its class's own, on a state_dict of the plain model's names.

    The directory then holds the base under its own names, with the experts' tensors among them (a Trainer resumes from
    these; `from_pretrained` lists them as unexpected), and `lmoe.safetensors` and `lmoe_config.json` for `load_lmoe`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Write the model; the arguments are those of transformers."""
        if getattr(self.model, "hf_quantizer", None) is not None:
            fail(_METHOD, "model", "not be quantised: save what was trained by save_lmoe(model, directory)", "one that is")
        tensors = self.model.state_dict() if state_dict is None else state_dict
        adapter = adapter_of(_METHOD, self.model, tensors)
        own = getattr(type(self.model), _METHOD)
        plain = plain_state_dict(self.model, tensors)
        result = own(self.model, save_directory, *args, is_main_process=is_main_process, state_dict=plain, **options)
        if is_main_process:
            write_adapter(save_directory, adapter)
        return result


def install(model: nn.Module) -> None:
    """Let this model, if it is transformers', save itself so that `from_pretrained` and `load_lmoe` restore it."""
    if callable(getattr(type(model), _METHOD, None)) and hasattr(model, "config"):
        setattr(model, _METHOD, PretrainedSaver(model))


def restore(model: nn.Module) -> None:
    """Give the model its class's own `save_pretrained` back."""
    model.__dict__.pop(_METHOD, None)


def plain_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state_dict under the names of the plain model; those of experts and gates under the layer's."""
    frozen = {f"{name}.frozen_layer.": f"{name}." for name in lmoe_layers(model)}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = plain_key(key)
        before = next((prefix for prefix in frozen if plain.startswith(prefix)), None)
        renamed[plain if before is None else frozen[before] + plain.removeprefix(before)] = tensor
    return renamed
