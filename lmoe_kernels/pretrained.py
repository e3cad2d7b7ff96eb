# SPDX-License-Identifier: Apache-2.0
"""Makes two methods of transformers models handle L-MoE layers: `save_pretrained` and `resize_token_embeddings`.

transformers matches tensors by name, and the weight of a wrapped layer has another name than in the plain model. Without
this module `from_pretrained` would not find that weight in the files and would initialise it randomly. So `save_pretrained`
writes the frozen model under the names of the plain model, and the adapter to the same directory.
`resize_token_embeddings` would replace an output embedding that has experts, so it raises an error for such a model.
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
# A name of a file that does not exist: transformers shows it in its error.
_NO_WEIGHTS = "the base is not here: load it as before training, then lmoe_kernels.load_lmoe(model, this directory)"


class Save:
    """The `save_pretrained` of a model with L-MoE layers. It calls that of the class with the names of the plain model.

    The directory then contains the frozen model and the experts in the files of transformers (a Trainer resumes from them,
    `from_pretrained` lists the experts as unexpected), and `lmoe.safetensors` and `lmoe_config.json` for `load_lmoe`.

    For a quantised model only the adapter is written, as PEFT does, because training does not change the frozen model. A
    Trainer can resume from that in a model that has the L-MoE layers; it lists the frozen tensors as missing.
    `from_pretrained` would initialise the frozen model randomly; it raises an error that says how to load the directory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hook = model.register_load_state_dict_pre_hook(_add_compile_segments)

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Write the model. The arguments are those of transformers."""
        original = getattr(type(self.model), _SAVE)
        if not lmoe_layers(self.model):
            return original(self.model, save_directory, is_main_process, state_dict, *args, **options)
        without_base = quantised.is_quantised(self.model)
        if without_base and options.get("push_to_hub"):
            fail(_SAVE, "push_to_hub", "be False for a quantised model, because only its adapter is saved", True)
        if state_dict is None and not without_base:
            state_dict = self.model.state_dict()
        adapter, result = adapter_of(_SAVE, self.model, state_dict), None
        if state_dict is not None and not without_base:
            plain = plain_state_dict(self.model, state_dict)
            result = original(self.model, save_directory, is_main_process, plain, *args, **options)
        if is_main_process:
            write_adapter(save_directory, adapter)
            if without_base:
                self._write_what_trainer_reads(Path(save_directory), adapter.tensors)
        return result

    def _write_what_trainer_reads(self, directory: Path, keys: Iterable[str]) -> None:
        """Write the index that Trainer reads to find the tensors, and a configuration that names a missing file of weights.

        `from_pretrained` raises an error with that name. If it is given another configuration, it raises an error because
        the index has no metadata.
        """
        index = {"weight_map": dict.fromkeys(keys, WEIGHTS)}
        config = {**json.loads(self.model.config.to_json_string()), "transformers_weights": _NO_WEIGHTS}
        for name, content in ((_INDEX, index), (_CONFIG, config)):
            Path(directory, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Resize:
    """The `resize_token_embeddings` of a model with L-MoE layers. It raises an error if the output embedding has experts."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Resize the embeddings. The arguments are those of transformers."""
        if (args or options) and isinstance(getattr(self.model, "get_output_embeddings", lambda: None)(), LMoELinear):
            must = "be resized before its output embedding gets experts (call remove_lmoe, resize, apply_lmoe)"
            fail(_RESIZE, "model", must, "one whose output embedding has experts")
        return getattr(type(self.model), _RESIZE)(self.model, *args, **options)


def install(model: nn.Module) -> None:
    """Make the transformers models and PEFT models among these modules save the experts, and quantised ones trainable."""
    for part in model.modules():
        if _SAVE in vars(part) or not callable(getattr(type(part), _SAVE, None)):
            continue
        if peft_interop.is_peft_model(part):
            peft_interop.install(part)
        elif hasattr(part, "config"):
            quantised.allow_training(part)
            setattr(part, _SAVE, Save(part))
            setattr(part, _RESIZE, Resize(part))


def restore(model: nn.Module) -> None:
    """Restore the methods of every model's class, and the quantizer of quantised models."""
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
    """The tensors of a state_dict under the names of the plain model; experts and gates under the name of their layer."""
    frozen = {f"{name}.frozen_layer.": f"{name}." for name in lmoe_layers(model)}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = plain_key(key)
        prefix = next((prefix for prefix in frozen if plain.startswith(prefix)), None)
        renamed[plain if prefix is None else frozen[prefix] + plain.removeprefix(prefix)] = tensor
    return renamed


def _add_compile_segments(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the segments of torch.compile to the keys of a state_dict, so that compiled modules can load a plain model's."""
    for name, part in model.named_modules():
        if name and "_orig_mod" in part._modules:
            above = f"{prefix}{_without_other_segments(name)}."
            below = f"{above}_orig_mod."
            for key in [key for key in state_dict if key.startswith(above) and not key.startswith(below)]:
                state_dict[below + key.removeprefix(above)] = state_dict.pop(key)


def _without_other_segments(name: str) -> str:
    """Remove the segments of activation checkpointing and FSDP, whose own hooks add them to the keys."""
    return ".".join(part for part in name.split(".") if part not in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
