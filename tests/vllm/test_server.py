"""The OpenAI-compatible server: equal to transformers, after a crash too; what it refuses, and what stops its start."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lmoe_kernels import apply_lmoe, save_lmoe
from tests.vllm import tiny
from tests.vllm.server import Server
from tests.vllm.tiny import LENGTH

Served = tuple[Server, LlamaForCausalLM]
DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}  # for /collective_rpc and /reset_prefix_cache


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with an adapter, and the model of transformers with it."""
    folder = tmp_path_factory.mktemp("served")
    model = tiny.save_adapter(base, folder / "adapter")
    extension = ("--worker-extension-cls", "lmoe_kernels.vllm.WorkerExtension")
    with Server(
        base, {"lmoe_adapter": str(folder / "adapter")}, folder / "log", *extension, environment=DEVELOPER
    ) as server:
        yield server.wait_until_ready(), model


def test_completions_equal_transformers_while_others_are_refused(base: Path, served: Served) -> None:
    server, model = served
    with ThreadPoolExecutor(2) as threads:
        requests = [threads.submit(server.complete, tiny.prompts(1, 17, 40), 60) for _ in range(2)]
        server.wait_until_it_computes(6)
        status, _ = server.post("/v1/completions", {"model": "unknown", "prompt": [5, 6], "max_tokens": 2})
    assert status == 404
    alone = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for request in requests:
        tiny.assert_generated_by(model, request.result())
        assert tiny.agreement(alone, request.result()) < 0.5


def test_new_experts_over_http(served: Served, tmp_path: Path) -> None:
    server, model = served
    prompts = tiny.prompts(3, 40)
    tiny.change_experts(model)
    save_lmoe(model, tmp_path)
    assert server.post("/collective_rpc", {"method": "load_lmoe", "args": [str(tmp_path)]})[0] == 200
    assert server.post("/reset_prefix_cache", {})[0] == 200
    tiny.assert_generated_by(model, server.complete(prompts, 8))


def test_a_server_killed_under_load_restarts_with_the_same_tokens(
    adapter: tuple[Path, LlamaForCausalLM], server: Callable[..., Server]
) -> None:
    directory, model = adapter
    prompts = tiny.prompts(1, 17, 40)
    first = server({"lmoe_adapter": str(directory)}).wait_until_ready()
    before = first.complete(prompts)
    tiny.assert_generated_by(model, before)

    def is_answered(prompt: list[int]) -> bool:
        try:
            return len(first.complete([prompt], LENGTH - len(prompt))) == 1
        except (OSError, HTTPException):
            return False

    with ThreadPoolExecutor(8) as threads:
        answered = threads.map(is_answered, tiny.prompts(*[8] * 8))
        first.wait_until_it_computes(4)
        first.kill()
        assert not all(answered)
    after = server({"lmoe_adapter": str(directory)}).wait_until_ready().complete(prompts)
    tiny.assert_generated_by(model, after)
    assert [one.tokens for one in after] == [one.tokens for one in before]


def _of_another_base(folder: Path, hidden: int, **options: Any) -> None:
    config = LlamaConfig(
        vocab_size=258, hidden_size=hidden, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    apply_lmoe(model, ["q_proj"], num_experts=2, rank=2, **options)
    save_lmoe(model, folder)


def _break(how: str, folder: Path, base: Path) -> None:
    """Write an adapter that must not be served."""
    if how in ("missing", "damaged"):
        tiny.save_adapter(base, folder)
        weights = folder / "lmoe.safetensors"
        if how == "missing":
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[: 8 + weights.stat().st_size // 2])
    elif how == "other shapes":
        _of_another_base(folder, hidden=32)
    elif how == "unknown layer":
        _of_another_base(folder, hidden=64)  # it has a fourth block
    else:
        model: nn.Module = LlamaForCausalLM.from_pretrained(base)
        apply_lmoe(model, ["q_proj"], num_experts=2, rank=2, modules_to_save=["lm_head"])
        save_lmoe(model, folder)


BROKEN = {
    "missing": "lmoe.safetensors does not exist",
    "damaged": "must be a safetensors file",
    "other shapes": "must have 32 features in and 128 out, as the base model of its adapter, got 64 and 128",
    "unknown layer": "'model.layers.3.self_attn.q_proj' of an adapter must be a linear layer of the model in vLLM",
    "modules_to_save": "an adapter must contain no other trained modules (modules_to_save), got 'lm_head",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_stops_the_start(how: str, base: Path, tmp_path: Path, engine: Callable[..., Any]) -> None:
    _break(how, tmp_path, base)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        engine(tmp_path)
    [line] = [line for line in str(error.value).splitlines() if "lmoe: " in line]
    assert BROKEN[how] in line


def test_a_broken_adapter_stops_the_server_with_one_line(base: Path, tmp_path: Path, server: Callable[..., Server]) -> None:
    _break("other shapes", tmp_path / "adapter", base)
    output = server({"lmoe_adapter": str(tmp_path / "adapter")}).output_at_its_end()
    assert any(line.rstrip().endswith(BROKEN["other shapes"]) for line in output.splitlines()), output[-3000:]
