"""New experts for an engine that runs: exact after each sync, and nothing changes after an error."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lmoe_kernels.vllm import record_routing, sync_weights
from tests.vllm import mixed, tiny
from tests.vllm.rollouts import assert_recorded, sampled

Adapter = tuple[Path, LlamaForCausalLM]
Q = "model.layers.0.self_attn.q_proj"


def tensors_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The experts and gates by their names in training."""
    keys = ("lora_a", "lora_b", "gate_weight", "gate_bias", "choice_bias")
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name.rpartition(".")[2] in keys}


@pytest.fixture
def running(engine: Callable[..., Any], adapter: Adapter) -> Any:
    return engine(adapter[0])


def test_the_tokens_after_a_sync_are_those_of_the_model_in_training(
    engine: Callable[..., Any], base: Path, tmp_path: Path, generate: Callable[..., Any]
) -> None:
    older, model = mixed.save_adapter(base, tmp_path / "1"), mixed.save_adapter(base, tmp_path / "2")
    running, prompts = engine(tmp_path / "1"), tiny.prompts(3, 40)
    tiny.assert_generated_by(older, generate(running, prompts, 12))
    sync_weights(running, model)
    after = generate(running, prompts, 12)
    tiny.assert_generated_by(model, after)
    assert tiny.agreement(older, after) < 0.5
    tiny.change_experts(model)
    tensors = tensors_of(model)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    buffer = torch.stack([flat, flat], dim=1)[:, 0]  # every tensor is a part of it, with gaps
    parts = buffer.split([tensor.numel() for tensor in tensors.values()])
    sync_weights(running, {key: part.view(tensors[key].shape) for key, part in zip(tensors, parts, strict=True)})
    tiny.assert_generated_by(model, generate(running, prompts, 12))


def test_a_sync_resets_the_prefix_cache(running: Any, base: Path, adapter: Adapter, generate: Callable[..., Any]) -> None:
    """Without the reset, the keys and values of the old experts would be read."""
    model, older, prompts = tiny.with_experts(base), adapter[1], tiny.prompts(200)
    generate(running, prompts, 2)
    sync_weights(running, model)
    tiny.assert_generated_by(model, generate(running, prompts))
    # vLLM's own call does not reset the cache, and shows that the cache is in use.
    running.collective_rpc("reload_weights", kwargs={"weights_iterator": list(tensors_of(older).items())})
    with pytest.raises(AssertionError, match=r"differ|another token"):
        tiny.assert_generated_by(older, generate(running, prompts))
    assert running.reset_prefix_cache()
    tiny.assert_generated_by(older, generate(running, prompts))


def _wrong(model: LlamaForCausalLM) -> Iterator[tuple[Any, str]]:
    """What sync_weights refuses, and its reason."""
    tensors = tensors_of(model)
    yield (
        {**tensors, "model.layers.9.self_attn.q_proj.lora_a": tensors[f"{Q}.lora_a"]},
        "got 'model.layers.9.self_attn.q_proj.lora_a'",
    )
    yield {**tensors, "model.embed_tokens.weight": torch.zeros(2, 2)}, "got 'model.embed_tokens.weight'"
    yield {**tensors, f"{Q}.lora_a": torch.zeros(4, 8, 63)}, "must have shape (4, 8, 64), got (4, 8, 63)"
    yield {**tensors, f"{Q}.lora_a": torch.zeros(4, 8, 64, dtype=torch.int64)}, "got torch.int64"
    yield (
        {k: t for k, t in tensors.items() if k != f"{Q}.gate_weight"},
        f"must hold '{Q}.gate_weight', got none of that name",
    )
    yield LlamaForCausalLM(model.config), "must have L-MoE layers"
    yield "adapter", "must be a model, or a mapping of names to tensors, got str"


def test_what_does_not_fit_is_one_line_and_changes_nothing(
    running: Any, base: Path, adapter: Adapter, generate: Callable[..., Any]
) -> None:
    model, prompts = tiny.with_experts(base), tiny.prompts(200)
    generate(running, prompts, 2)
    for weights, reason in _wrong(model):
        with pytest.raises((ValueError, TypeError)) as error:
            sync_weights(running, weights)
        assert reason in str(error.value)
        assert str(error.value).startswith("sync_weights: ")
        assert "\n" not in str(error.value)
    for other, reason in (
        ({"num_experts": 3}, "num_experts=3 in place of 4"),
        ({"top_k": 2, "alpha": 64.0}, "top_k=2 in place of None"),
    ):
        with pytest.raises(ValueError, match=reason):
            sync_weights(running, tiny.with_experts(base, **other))
    with pytest.raises(ValueError, match="adapter must be one of 'default', got 'math'"):
        sync_weights(running, model, adapter="math")
    with pytest.raises(TypeError, match=r"llm must be a vllm.LLM"):
        sync_weights(running.llm_engine.engine_core, model)
    running.llm_engine.add_request("one", {"prompt_token_ids": prompts[0]}, _sampling())
    with pytest.raises(ValueError, match="have no request in progress"):
        sync_weights(running, model)
    running.llm_engine.abort_request(["one"])
    running.llm_engine.step()
    tiny.assert_generated_by(adapter[1], generate(running, prompts))


def _sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=4)


def test_two_ranks_in_other_processes(
    engine: Callable[..., Any],
    base: Path,
    adapter: Adapter,
    generate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers of an engine in another process need the extension, for a sync and for a recording."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    running = engine(
        adapter[0],
        tensor_parallel_size=2,
        worker_extension_cls="lmoe_kernels.vllm.WorkerExtension",
        enable_prefix_caching=False,
        hf_overrides={"lmoe_router_logits": True},
    )
    model, prompts = tiny.with_experts(base), tiny.prompts(3, 40)
    parallel = running.llm_engine.vllm_config.parallel_config
    with monkeypatch.context() as without:
        without.setattr(parallel, "worker_extension_cls", "")
        with pytest.raises(ValueError, match="llm must be created with worker_extension_cls="):
            sync_weights(running, model)
    tiny.assert_generated_by(adapter[1], generate(running, prompts, 8))
    sync_weights(running, model)
    tiny.assert_generated_by(model, generate(running, prompts, 8))
    with record_routing(running) as routing:
        outputs = sampled(running, prompts, max_tokens=8)
    assert_recorded(model, outputs, routing)
