"""An adapter whose layers have different options, as many as one model can have, so that one engine tests them all."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from lmoe_kernels import apply_lmoe, lmoe_layers, save_lmoe
from tests.vllm import tiny

# k_proj, a part of the fused layer qkv_proj, has no experts. gate_proj and up_proj share a router. In the first block,
# q_proj and down_proj have no experts either.
_OPTIONS: dict[str, dict[str, Any]] = {
    r".*[1-9]\.self_attn\.q_proj": {"num_experts": 6, "rank": 3, "top_k": 2, "mixing": "outputs", "gate_bias": True},
    "v_proj": {"num_experts": 4, "rank": 5, "shared_a": True},
    "o_proj": {"num_experts": 5, "rank": 4, "top_k": 2, "choice_bias": True, "gate_bias": True},
    r".*\.(gate|up)_proj": {"num_experts": 3, "rank": 4, "router": "group", "gate_bias": True},
    r".*[1-9]\.mlp\.down_proj": {"num_experts": 8, "rank": 2, "top_k": 3, "renormalize": False},
}


def save_adapter(base: Path, directory: Path) -> LlamaForCausalLM:
    """Save such an adapter with random experts and return the model in fp32 with these."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for target, options in _OPTIONS.items():
        apply_lmoe(model, target, **options)
    tiny.change_experts(model)
    for layer in lmoe_layers(model).values():
        if layer.choice_bias is not None:
            layer.choice_bias.normal_()
    save_lmoe(model, directory)
    return model.eval()
