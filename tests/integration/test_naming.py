"""A module has the name of the plain model, whatever wraps the model or its parts."""

import copy

import pytest
import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from lmoe_kernels.naming import actual_names, plain_modules, unwrapped
from tests.models import llama


def _compiled_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block)
    return model


def _checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ == "LlamaDecoderLayer")
    return model


WRAPPINGS = {
    "compiled": torch.compile,
    "compiled blocks": _compiled_blocks,
    "regions compiled by Accelerate": compile_regions,
    "checkpointed blocks": _checkpointed,
    "both": lambda model: torch.compile(_compiled_blocks(_checkpointed(model))),
    "nn.DataParallel": nn.DataParallel,
    "PEFT": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_are_those_of_the_plain_model(wrapping: str) -> None:
    plain = llama()
    wrapped = WRAPPINGS[wrapping](copy.deepcopy(plain))
    assert any(actual != name for name, actual in actual_names(wrapped).items())
    modules = plain_modules(wrapped)
    for name, module in plain.named_modules():
        assert type(modules[name]) is type(module), name
        assert wrapped.get_submodule(actual_names(wrapped)[name]) is modules[name]
    added = set(modules) - set(dict(plain.named_modules()))
    assert all("q_proj.lora_" in name for name in added)
    assert type(unwrapped(wrapped)) is type(plain)


def test_a_shared_module_has_all_its_names() -> None:
    linear = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    assert {name for name, module in plain_modules(model).items() if module is linear} == {"a", "b.0"}
