"""The OpenAI-compatible server: equal to transformers, after a crash too; what it refuses, and what stops its start."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from lmoe_kernels import save_lmoe
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


def test_a_broken_adapter_stops_the_start_with_one_line(base: Path, tmp_path: Path, server: Callable[..., Server]) -> None:
    tiny.save_adapter(base, tmp_path)
    weights = tmp_path / "lmoe.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    output = server({"lmoe_adapter": str(tmp_path)}).output_at_its_end()
    assert re.search(rf"lmoe: {re.escape(str(weights))} must be a safetensors file, got \S", output), output[-3000:]
