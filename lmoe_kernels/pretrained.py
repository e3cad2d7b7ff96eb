"""What transformers' own methods must know of L-MoE layers: `save_pretrained` and `resize_token_embeddings`.

transformers matches tensors by name, and a wrapped layer has another name than the plain model's: its weight would be
written where `from_pretrained` does not find it, and drawn anew. So `save_pretrained` writes the plain model, under its own
names, and the adapter beside it. `resize_token_embeddings` would change the output embedding under its experts.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmoe_kernels import peft_interop, quantised
from lmoe_kernels.adapter import WEIGHTS, write_adapter
from lmoe_kernels.checks import fail
from lmoe_kernels.contents import adapter_of
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.naming import plain_key
from lmoe_kernels.targets import lmoe_layers

_SAVE, _RESIZE = "save_pretrained", "resize_token_embeddings"
_INDEX, _CONFIG = "model.safetensors.index.json", "config.json"
_NO_WEIGHTS = "the base is not here: load it as before training, then lmoe_kernels.load_lmoe(model, this directory)"


class Save:
    """`save_pretrained` of a model with L-MoE layers: its class's own, on a state_dict of the plain model's names.

    The directory then holds the base under its own names, with the experts' tensors among them (a Trainer resumes from
    these; `from_pretrained` lists them as unexpected), and `lmoe.safetensors` and `lmoe_config.json` for `load_lmoe`.

    Of a quantised model, whose base does not change in training, the adapter alone is written, as PEFT does. A Trainer
    resumes from it in a model that has its L-MoE layers (and lists the base's tensors as missing); `from_pretrained` of
    the directory, which would draw the base anew, raises an error that says how to load it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hook = model.register_load_state_dict_pre_hook(_find_compiled_parts)

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
        without_base = quantised.is_quantised(self.model)
        if without_base and options.get("push_to_hub"):
            fail(_SAVE, "push_to_hub", "be False for a quantised model, of which the adapter alone is saved", True)
        if state_dict is None and not without_base:
            state_dict = self.model.state_dict()
        adapter, result = adapter_of(_SAVE, self.model, state_dict), None
        if state_dict is not None and not without_base:
            plain = plain_state_dict(self.model, state_dict)
            result = own(self.model, save_directory, is_main_process, plain, *args, **options)
        if is_main_process:
            write_adapter(save_directory, adapter)
            if without_base:
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
    """Let transformers' models in this one, and PEFT's around it, save the experts, and a quantised one be trained."""
    for part in model.modules():
        if _SAVE in vars(part) or not callable(getattr(type(part), _SAVE, None)):
            continue
        if peft_interop.is_peft_model(part):
            peft_interop.install(part)
        elif hasattr(part, "config"):
            quantised.let_train(part)
            setattr(part, _SAVE, Save(part))
            setattr(part, _RESIZE, Resize(part))


def restore(model: nn.Module) -> None:
    """Give every model its class's own methods back, and a quantised one its quantizer."""
    for part in model.modules():
        saver = vars(part).get(_SAVE)
        if peft_interop.is_peft_model(part):
            peft_interop.restore(part)
        elif isinstance(saver, Save):
            quantised.restore(part)
            saver.hook.remove()
            for name in (_SAVE, _RESIZE):
                vars(part).pop(name)


def plain_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state_dict under the names of the plain model; those of experts and gates under the layer's."""
    frozen = {f"{name}.frozen_layer.": f"{name}." for name in lmoe_layers(model)}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = plain_key(key)
        before = next((prefix for prefix in frozen if plain.startswith(prefix)), None)
        renamed[plain if before is None else frozen[before] + plain.removeprefix(before)] = tensor
    return renamed


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
