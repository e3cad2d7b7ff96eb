"""Rollouts: sampled completions, and the router logits that the model of transformers has for their tokens."""

from typing import Any

import torch
from transformers import LlamaForCausalLM

from lmoe_kernels import lmoe_layers
from lmoe_kernels.vllm import Routing


def sampled(llm: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    """What vLLM draws at temperature 1 after these prompts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False, **options)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


@torch.no_grad()
def assert_recorded(model: LlamaForCausalLM, outputs: list[Any], routing: Routing) -> None:
    """Fail unless the router logits of all layers and tokens are those of the model."""
    layers = lmoe_layers(model)
    for layer in layers.values():
        layer.output_router_logits = True
    for output in outputs:
        for completion, recorded in zip(output.outputs, routing.of(output), strict=True):
            model(torch.tensor([[*output.prompt_token_ids, *completion.token_ids][:-1]]))
            assert recorded.keys() == layers.keys()
            for name, layer in layers.items():
                assert layer.router_logits is not None
                torch.testing.assert_close(recorded[name], layer.router_logits[0], rtol=0, atol=1e-5)
