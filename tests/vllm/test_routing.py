"""Recorded router logits are those of the model of transformers on the same tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lmoe_kernels import collect_router_logits, lmoe_layers
from lmoe_kernels.vllm import record_routing, replay_routing
from tests.vllm import tiny

RECORDED: dict[str, Any] = {"enable_prefix_caching": False, "hf_overrides": {"lmoe_router_logits": True}}


def sampled(llm: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False, **options)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


@torch.no_grad()
def assert_recorded(model: LlamaForCausalLM, outputs: list[Any], routing: Any) -> None:
    for layer in lmoe_layers(model).values():
        layer.output_router_logits = True
    for output in outputs:
        for completion, recorded in zip(output.outputs, routing.of(output), strict=True):
            model(torch.tensor([[*output.prompt_token_ids, *completion.token_ids][:-1]]))
            expected = collect_router_logits(model)
            assert recorded.keys() == expected.keys() == lmoe_layers(model).keys()
            for name, logits in recorded.items():
                torch.testing.assert_close(logits, expected[name][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "gate_bias": True}, {"top_k": 2, "choice_bias": True}], ids=str)
def test_the_logits_of_a_rollout(options: dict[str, Any], engine: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    model = tiny.save_adapter(base, tmp_path, **options)
    running = engine(tmp_path, **RECORDED)
    sampled(running, tiny.prompts(5), max_tokens=3)  # before the recording
    with record_routing(running) as routing:
        # more tokens than a batch holds, so that prompts come in parts
        outputs = [
            *sampled(running, tiny.prompts(1, 17, 200, 90), max_tokens=12),
            *sampled(running, tiny.prompts(7), n=3, max_tokens=9),
        ]
    assert_recorded(model, outputs, routing)
    later = sampled(running, tiny.prompts(5), max_tokens=3)
    with pytest.raises(ValueError, match="got no logits of token 0 of request"):
        routing.of(later[0])


def test_training_with_the_experts_of_the_rollout(engine: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """The policy's log-probabilities under replay are those of the rollout."""
    model = tiny.save_adapter(base, tmp_path, top_k=2)
    running = engine(tmp_path, **RECORDED)
    with record_routing(running) as routing:
        outputs = sampled(running, tiny.prompts(6, 30), max_tokens=12)
    longest = max(len(output.prompt_token_ids) for output in outputs) + 12
    rows = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    batch = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    with replay_routing(model, [routing.of(output)[0] for output in outputs]), torch.no_grad():
        logprobs = model(batch).logits.log_softmax(-1)
    for output, row, of_row in zip(outputs, rows, logprobs, strict=True):
        start = len(output.prompt_token_ids)
        expected = of_row[range(start - 1, len(row) - 1), row[start:]]
        got = torch.tensor(
            [step[token].logprob for step, token in zip(output.outputs[0].logprobs, row[start:], strict=True)]
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_compiled_layers_record_too(engine: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    model = tiny.save_adapter(base, tmp_path, top_k=2)
    running = engine(tmp_path, enforce_eager=False, **RECORDED)
    with record_routing(running) as routing:
        outputs = sampled(running, tiny.prompts(1, 40), max_tokens=5)
    assert_recorded(model, outputs, routing)


def test_what_cannot_be_recorded_is_refused(
    engine: Callable[..., Any], base: Path, adapter: tuple[Path, LlamaForCausalLM], generate: Callable[..., Any]
) -> None:
    running = engine(adapter[0])
    config = running.llm_engine.vllm_config
    with pytest.raises(ValueError, match=r"hf_overrides that say \{'lmoe_router_logits': True\}"), record_routing(running):
        pass
    config.quant_config.keeps_router_logits = True
    with pytest.raises(ValueError, match="got enable_prefix_caching: cached tokens pass no router"), record_routing(running):
        pass
    config.cache_config.enable_prefix_caching = False
    config.quant_config.keeps_router_logits = False
    tiny.assert_generated_by(adapter[1], generate(running, tiny.prompts(9), 4))


def test_an_error_ends_the_recording(engine: Callable[..., Any], adapter: tuple[Path, LlamaForCausalLM]) -> None:
    running = engine(adapter[0], **RECORDED)

    def failing() -> None:
        with record_routing(running):
            with pytest.raises(ValueError, match="llm must be recorded once at a time"), record_routing(running):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    with record_routing(running) as routing:
        outputs = sampled(running, tiny.prompts(4), max_tokens=2)
    assert_recorded(adapter[1], outputs, routing)
