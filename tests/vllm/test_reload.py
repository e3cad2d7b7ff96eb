"""vLLM's reload of weights with experts: the adapter alone, the base alone, both in one stream, and one after the other."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.vllm import mixed, tiny

_EXPERTS = ("lora_a", "lora_b", "gate_weight", "gate_bias", "choice_bias")


def _weights(model: nn.Module, experts: bool, base: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names of training: those of experts as they are, those of the base as in its checkpoint."""
    for name, tensor in model.state_dict().items():
        of_experts = name.endswith(_EXPERTS)
        if (experts and of_experts) or (base and not of_experts):
            yield name.replace(".frozen_layer.", "."), tensor.clone()


def _change_base(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(_EXPERTS) and parameter.dim() == 2:
                parameter.copy_(parameter[torch.randperm(len(parameter))] if "proj" in name else parameter)


def test_every_order_of_reloads(base: Path, tmp_path: Path, engine, generate) -> None:
    model = mixed.save_adapter(base, tmp_path)
    llm, prompts = engine(tmp_path, enable_prefix_caching=False), tiny.prompts(2, 20)
    tiny.assert_generated_by(model, generate(llm, prompts, 8))
    for experts, of_base in ((True, False), (True, False), (False, True), (True, True), (False, True), (True, False)):
        before = copy.deepcopy(model)
        if experts:
            tiny.change_experts(model)
        if of_base:
            _change_base(model)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _weights(model, experts, of_base)})
        results = generate(llm, prompts, 8)
        tiny.assert_generated_by(model, results)
        assert tiny.agreement(before, results) < 0.9
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")  # a part of what one layer of vLLM holds
    torch.nn.init.normal_(layer.lora_b, std=0.3)
    part = [("model.layers.1.self_attn.q_proj.lora_b", layer.lora_b.detach().clone())]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(part)})
    tiny.assert_generated_by(model, generate(llm, prompts, 8))
    tiny.change_experts(model)
    llm.apply_model(lambda served: served.load_weights(_weights(model, True, False)) and None)
    tiny.assert_generated_by(model, generate(llm, prompts, 8))
