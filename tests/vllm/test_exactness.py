"""What vLLM generates with an adapter: the tokens and log-probabilities of transformers with the same experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lmoe_kernels import load_lmoe
from tests.vllm import mixed, tiny

WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "transformers backend": {"model_impl": "transformers"},
    "chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_option_at_once(
    way: str, base: Path, tmp_path: Path, engine, generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "backend" in way:  # in a process of its own: vLLM changes the classes of transformers
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = mixed.save_adapter(base, tmp_path)
    results = generate(engine(tmp_path, **WAYS[way]), tiny.prompts(1, 5, 40))
    tiny.assert_generated_by(model, results)
    alone = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert tiny.agreement(alone, results) < 0.5


def test_bf16_is_as_exact_as_transformers_in_bf16(base: Path, tmp_path: Path, engine, generate) -> None:
    tiny.save_adapter(base, tmp_path, gate_bias=True)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    load_lmoe(model, tmp_path)
    results = generate(engine(tmp_path, dtype="bfloat16"), tiny.prompts(3, 30))
    squares = {"vLLM": 0.0, "transformers": 0.0}
    true = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float().eval()
    load_lmoe(true, tmp_path)
    for result in results:
        steps = torch.arange(len(result.tokens)), torch.tensor(result.tokens)
        expected = tiny.logprobs_of(true, result.prompt, result.tokens)[steps]
        plain = tiny.logprobs_of(model, result.prompt, result.tokens)[steps]
        squares["vLLM"] += (torch.tensor(result.logprobs) - expected).square().sum().item()
        squares["transformers"] += (plain - expected).square().sum().item()
    assert squares["vLLM"] <= 2 * squares["transformers"] + 1e-4
