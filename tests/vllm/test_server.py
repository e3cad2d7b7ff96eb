"""The OpenAI-compatible server: equal to transformers, after a crash too; what it refuses."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.vllm import tiny


def test_completions_equal_transformers(base: Path, adapter: tuple[Path, LlamaForCausalLM], server) -> None:
    directory, model = adapter
    running = server({"lmoe_adapter": str(directory)}).wait_until_ready()
    results = running.complete(tiny.prompts(1, 17, 40))
    tiny.assert_generated_by(model, results)
    alone = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert tiny.agreement(alone, results) < 0.5
