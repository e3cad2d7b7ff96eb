"""What transformers' own methods must know of L-MoE layers: `save_pretrained` and `resize_token_embeddings`.

transformers matches tensors by name, and a wrapped layer has another name than the plain model's: its weight would be
written where `from_pretrained` does not find it, and drawn anew. So `save_pretrained` writes the plain model, under its own
names, and the adapter beside it. `resize_token_embeddings` would change the output embedding under its experts.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.adapter import write_adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.contents import adapter_of
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.naming import plain_key
from lmoe_kernels.targets import lmoe_layers

_SAVE, _RESIZE = "save_pretrained", "resize_token_embeddings"


class Save:
    """`save_pretrained` of a model with L-MoE layers: its class's own, on a state_dict of the plain model's names.

    The directory then holds the base under its own names, with the experts' tensors among them (a Trainer resumes from
    these; `from_pretrained` lists them as unexpected), and `lmoe.safetensors` and `lmoe_config.json` for `load_lmoe`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Write the model; the arguments are those of transformers."""
        own = getattr(type(self.model), _SAVE)
        if not lmoe_layers(self.model):
            return own(self.model, save_directory, is_main_process, state_dict, *args, **options)
        if getattr(self.model, "hf_quantizer", None) is not None:
            fail(_SAVE, "model", "not be quantised: save what was trained by save_lmoe(model, directory)", "one that is")
        tensors = self.model.state_dict() if state_dict is None else state_dict
        adapter = adapter_of(_SAVE, self.model, tensors)
        plain = plain_state_dict(self.model, tensors)
        result = own(self.model, save_directory, is_main_process, plain, *args, **options)
        if is_main_process:
            write_adapter(save_directory, adapter)
        return result


class Resize:
    """`resize_token_embeddings` of a model with L-MoE layers: its class's own, unless the output embedding has experts."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Resize; the arguments are those of transformers."""
        if (args or options) and isinstance(getattr(self.model, "get_output_embeddings", lambda: None)(), LMoELinear):
            must = "be resized before its output embedding gets experts (remove_lmoe, resize, apply_lmoe)"
            fail(_RESIZE, "model", must, "one that has them")
        return getattr(type(self.model), _RESIZE)(self.model, *args, **options)


def install(model: nn.Module) -> None:
    """Give every model of transformers in this one the methods above."""
    for module in model.modules():
        if callable(getattr(type(module), _SAVE, None)) and hasattr(module, "config"):
            setattr(module, _SAVE, Save(module))
            if hasattr(type(module), _RESIZE):
                setattr(module, _RESIZE, Resize(module))


def restore(model: nn.Module) -> None:
    """Give every model its class's own methods back."""
    for module in model.modules():
        for name in (_SAVE, _RESIZE):
            module.__dict__.pop(name, None)


def plain_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state_dict under the names of the plain model; those of experts and gates under the layer's."""
    frozen = {f"{name}.frozen_layer.": f"{name}." for name in lmoe_layers(model)}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = plain_key(key)
        before = next((prefix for prefix in frozen if plain.startswith(prefix)), None)
        renamed[plain if before is None else frozen[before] + plain.removeprefix(before)] = tensor
    return renamed
