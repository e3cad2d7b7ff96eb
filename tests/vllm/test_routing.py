"""Recorded router logits are those of transformers on the same tokens, and training can use the same experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lmoe_kernels.vllm import record_routing, replay_routing
from tests.vllm import mixed, tiny
from tests.vllm.rollouts import assert_recorded, sampled

RECORDED: dict[str, Any] = {"enable_prefix_caching": False, "hf_overrides": {"lmoe_router_logits": True}}


def test_the_logits_of_a_rollout(engine: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    model = mixed.save_adapter(base, tmp_path)
    running = engine(tmp_path, **RECORDED)

    def failing() -> None:
        with record_routing(running):
            with pytest.raises(ValueError, match="llm must be recorded once at a time"), record_routing(running):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    sampled(running, tiny.prompts(5), max_tokens=3)  # before the recording
    with record_routing(running) as routing:
        # More tokens than a batch holds, so that prompts come in parts; and several completions of one prompt.
        outputs = sampled(running, tiny.prompts(1, 17, 200, 90), max_tokens=12)
        outputs += sampled(running, tiny.prompts(7), n=3, max_tokens=9)
    assert_recorded(model, outputs, routing)
    [later] = sampled(running, tiny.prompts(5), max_tokens=3)
    with pytest.raises(ValueError, match="got no logits of token 0 of request"):
        routing.of(later)


def test_training_has_the_logprobs_of_a_compiled_rollout(engine: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    model = tiny.save_adapter(base, tmp_path, top_k=2)
    running = engine(tmp_path, enforce_eager=False, **RECORDED)
    with record_routing(running) as routing:
        outputs = sampled(running, tiny.prompts(6, 30), max_tokens=12)
    assert_recorded(model, outputs, routing)
    rows = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    batch = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    with replay_routing(model, [routing.of(output)[0] for output in outputs]), torch.no_grad():
        logprobs = model(batch).logits.log_softmax(-1)
    for output, row, of_row in zip(outputs, rows, logprobs, strict=True):
        start, [completion] = len(output.prompt_token_ids), output.outputs
        expected = of_row[range(start - 1, len(row) - 1), row[start:]]
        got = [step[token].logprob for step, token in zip(completion.logprobs, row[start:], strict=True)]
        torch.testing.assert_close(torch.tensor(got), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_recorded_is_refused(engine: Callable[..., Any], adapter: tuple[Path, LlamaForCausalLM]) -> None:
    running = engine(adapter[0])
    reasons = [
        r"hf_overrides that say \{'lmoe_router_logits': True\}",
        "got enable_prefix_caching: cached tokens pass no router",
    ]
    for reason in reasons:
        with pytest.raises(ValueError, match=f"^record_routing: .*{reason}"), record_routing(running):
            pass
        running.llm_engine.vllm_config.quant_config.keeps_router_logits = True
    with pytest.raises(TypeError, match=r"^lmoe: lmoe_router_logits of --hf-overrides must be a bool"):
        engine(adapter[0], hf_overrides={"lmoe_router_logits": 1})
