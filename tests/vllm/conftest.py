"""Fixtures for tests with vLLM: a tiny model, an adapter for it, engines in this process and servers."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.vllm import tiny
from tests.vllm.server import Server
from tests.vllm.tiny import LENGTH, Generated

# Before vLLM is imported. An engine in this process can be called with functions, and a test sees its errors.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out of `make test`, whose environment has no vLLM."""
    return None if config.option.markexpr == "vllm" else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("vllm")


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny Llama with a tokenizer."""
    torch.manual_seed(request.config.option.seed)
    return tiny.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """The directory of an adapter for it, and the model of transformers with these experts."""
    directory = tmp_path_factory.mktemp("adapter")
    return directory, tiny.save_adapter(base, directory)


@pytest.fixture
def engine(base: Path) -> Iterator[Callable[..., Any]]:
    """A function that starts vLLM in this process, with the adapter of a directory or without one, in fp32 and eager."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engines = []

    def start(adapter: Path | None = None, **options: Any) -> LLM:
        if adapter is not None:
            overrides = {"lmoe_adapter": str(adapter), **options.pop("hf_overrides", {})}
            options = {"quantization": "lmoe", "hf_overrides": overrides, **options}
        options = {
            "dtype": "float32", "enforce_eager": True, "max_model_len": LENGTH, "max_num_batched_tokens": LENGTH,
            "max_num_seqs": 16, "disable_log_stats": True, **options,
        }  # fmt: skip
        with torch.random.fork_rng():  # the engine seeds torch with 0
            engines.append(LLM(str(base), **options))
        return engines[-1]

    yield start
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def generate() -> Callable[..., list[Generated]]:
    """A function that lets an engine generate greedily."""
    from vllm import SamplingParams

    def run(llm: Any, prompts: Sequence[list[int]], count: int = 32, **options: Any) -> list[Generated]:
        params = SamplingParams(temperature=0, max_tokens=count, logprobs=0, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, **options)
        results = []
        for prompt, output in zip(prompts, outputs, strict=True):
            [only] = output.outputs
            tokens = list(only.token_ids)
            logprobs = [step[token].logprob for step, token in zip(only.logprobs, tokens, strict=True)]
            results.append(Generated(prompt, tokens, logprobs))
        return results

    return run


@pytest.fixture
def server(base: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A function that starts a server with these hf_overrides. It ends with the test at the latest."""
    servers: list[Server] = []

    def start(overrides: dict[str, Any], *arguments: str, **options: Any) -> Server:
        servers.append(Server(base, overrides, tmp_path / f"server-{len(servers)}.log", *arguments, **options))
        return servers[-1]

    yield start
    for one in servers:
        one.kill()
