"""Small models that several test files put experts into."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lmoe_kernels import apply_lmoe, lmoe_layers

IDS = torch.arange(24).view(2, 12)


def llama(model_class: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    return model_class(config).double().eval()  # in float64 a wrong formula shows and rounding does not


def with_experts(model: nn.Module, **options) -> nn.Module:
    apply_lmoe(model, ["q_proj", "down_proj"], num_experts=3, rank=2, **options)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def state(model: nn.Module) -> dict:
    return {name: (type(m), [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}
