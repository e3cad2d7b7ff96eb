"""Several adapters in one engine and one server, chosen by the LoRARequest of each request: equal to each of them alone."""

import copy
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lmoe_kernels import lmoe_layers
from lmoe_kernels.vllm.adapters import check_interface, install
from tests.vllm import tiny
from tests.vllm.server import BASE_NAME, Server
from tests.vllm.tiny import Generated

# Everything that may differ between adapters: the modules, the numbers of experts, the ranks and the options.
ADAPTERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "math": (["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"], {"num_experts": 4, "rank": 8, "shared_a": True}),
    "code": (["q_proj", "k_proj", "up_proj"], {"num_experts": 6, "rank": 4, "mixing": "outputs", "top_k": 2}),
    "text": (tiny.ALL_SEVEN, {"num_experts": 3, "rank": 5, "top_k": 2, "gate_bias": True, "choice_bias": True}),
}  # fmt: skip
BLOCK = 32  # tokens of a block of the prefix cache

Models = dict[str | None, nn.Module]


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    """The directory of the adapters, and what transformers computes: by the name of a request, with scales and without."""
    root = tmp_path_factory.mktemp("adapters")
    models: Models = {None: LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    for name, (targets, options) in ADAPTERS.items():
        models[name] = tiny.save_adapter(base, root / name, targets, **options)
    models["half"], models["minus"] = scaled(models["math"], 0.5), scaled(models["code"], -0.75)
    return root, models


def scaled(model: nn.Module, factor: float) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in lmoe_layers(changed).values():
            layer.lora_b *= factor
    return changed


def paths(root: Path) -> dict[str, str]:
    """The path of each name in a LoRARequest."""
    scales = {"half": f"{root / 'math'}#scale=0.5", "minus": f"{root / 'code'}/#scale=-0.75"}
    return {name: str(root / name) for name in ADAPTERS} | scales


def request(root: Path, name: str | None, **options: Any) -> Any:
    from vllm.lora.request import LoRARequest

    if name is None:
        return None
    number = list(paths(root)).index(name) + 7  # any numbers do
    return LoRARequest(name, number, paths(root)[name], **options)


@pytest.fixture
def several(engine: Callable[..., Any], saved: tuple[Path, Models]) -> Callable[..., Any]:
    """A function that starts an engine with all adapters."""
    overrides = {"lmoe_adapters": {name: str(saved[0] / name) for name in ADAPTERS}}

    def start(**options: Any) -> Any:
        return engine(quantization="lmoe", hf_overrides=overrides, enable_lora=True, **{"max_loras": 5} | options)

    return start


def assert_each_alone(models: Models, names: Sequence[str | None], results: Sequence[Generated]) -> None:
    for name in models:
        of_name = [result for other, result in zip(names, results, strict=True) if other == name]
        assert of_name, name
        tiny.assert_generated_by(models[name], of_name)
    others = [result for name, result in zip(names, results, strict=True) if name is not None]
    assert tiny.agreement(models[None], others) < 0.5


def mixed(models: Models, *lengths: int) -> tuple[list[list[int]], list[str | None]]:
    """A prompt of each length for each name, in any order."""
    pairs = [(prompt, name) for name in models for prompt in tiny.prompts(*lengths)]
    random.shuffle(pairs)
    return [prompt for prompt, _ in pairs], [name for _, name in pairs]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 64, "block_size": BLOCK},  # prompts in several pieces, next to tokens of other requests
        {"max_loras": 1},  # vLLM runs requests of one adapter at a time, and those without one
        {"model_impl": "transformers", "tensor_parallel_size": 2},  # in processes of their own
    ],
    ids=str,
)
def test_requests_of_one_batch_equal_each_adapter_alone(
    options: dict[str, Any], several: Callable[..., Any], generate: Callable[..., Any], saved: tuple[Path, Models]
) -> None:
    root, models = saved
    llm = several(**options)
    prompts, names = mixed(models, 1, 7, 150)
    results = generate(llm, prompts, count=16, lora_request=[request(root, name) for name in names])
    assert_each_alone(models, names, results)


def test_the_prefix_cache_keeps_names_apart(
    several: Callable[..., Any], generate: Callable[..., Any], saved: tuple[Path, Models]
) -> None:
    from vllm import SamplingParams

    root, models = saved
    llm = several(block_size=BLOCK)
    [prompt] = tiny.prompts(3 * BLOCK + 5)

    def cached(name: str | None) -> int:
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, lora_request=request(root, name), use_tqdm=False)
        return output.num_cached_tokens

    names = random.sample(list(models), len(models))
    assert [cached(name) for name in names] == [0] * len(names)  # none of them uses a block of another one
    assert [cached(name) for name in names] == [3 * BLOCK] * len(names)
    assert_each_alone(models, names, [generate(llm, [prompt], 8, lora_request=request(root, name))[0] for name in names])


def test_a_request_without_adapter_gets_the_base_bit_for_bit(
    engine: Callable[..., Any], several: Callable[..., Any], generate: Callable[..., Any]
) -> None:
    prompts = tiny.prompts(3, 40, 90)
    assert generate(several(), prompts) == generate(engine(), prompts)


def test_a_wrong_request_harms_no_other(
    several: Callable[..., Any], generate: Callable[..., Any], saved: tuple[Path, Models]
) -> None:
    from vllm.lora.request import LoRARequest

    root, models = saved
    llm = several()
    prompts, names = mixed(models, 9)
    for path, reason in ((str(root), "be a directory of lmoe_adapters"), (f"{root / 'math'}#scale=x", "a finite number")):
        wrong = LoRARequest("wrong", 99, path)
        with pytest.raises(Exception, match=r"^lmoe: the path of a LoRARequest must") as raised:
            generate(llm, prompts, lora_request=[wrong, *(request(root, name) for name in names[1:])])
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(Exception, match=r"^lmoe: the path of a LoRARequest must"):
            llm.llm_engine.add_lora(wrong)
    results = generate(llm, prompts, count=8, lora_request=[request(root, name) for name in names])
    assert_each_alone(models, names, results)
    assert 99 not in llm.llm_engine.list_loras()


def test_load_inplace_reads_a_directory_again(
    several: Callable[..., Any], generate: Callable[..., Any], base: Path, saved: tuple[Path, Models], tmp_path: Path
) -> None:
    root, models = saved
    llm = several()
    prompts, names = mixed(models, 5, 20)
    requests = [request(root, name) for name in names]
    assert_each_alone(models, names, generate(llm, prompts, 8, lora_request=requests))
    name, layer = next(iter(lmoe_layers(models["math"]).items()))
    with pytest.raises(ValueError, match=r"^lmoe: lora_a among the weights .*, got several adapters$"):
        llm.apply_model(lambda model: model.load_weights([(f"{name}.lora_a", layer.lora_a)]))

    again = request(root, "math", load_inplace=True)
    targets, options = ADAPTERS["math"]
    old = {path: path.read_bytes() for path in (root / "math").iterdir()}
    try:
        tiny.save_adapter(base, root / "math", targets, **options | {"top_k": 1})
        with pytest.raises(Exception, match=r"^lmoe: .* must hold the layers, options and shapes .*, got others$"):
            llm.llm_engine.add_lora(again)
        (root / "math" / "lmoe.safetensors").write_bytes(b"damaged")
        with pytest.raises(Exception, match=r"^lmoe: "):
            llm.llm_engine.add_lora(again)
        assert_each_alone(models, names, generate(llm, prompts, 8, lora_request=requests))

        new = tiny.save_adapter(base, root / "math", targets, **options)
        assert llm.llm_engine.add_lora(again)
        assert llm.reset_prefix_cache()
        changed = {**models, "math": new, "half": scaled(new, 0.5)}
        assert_each_alone(changed, names, generate(llm, prompts, 8, lora_request=requests))
    finally:
        for path, content in old.items():
            path.write_bytes(content)


def complete_all(running: Server, models: Models) -> None:
    """Complete prompts for all names at the same time, and check them."""
    prompts, names = mixed(models, 4, 70)
    with ThreadPoolExecutor(len(names)) as threads:
        results = threads.map(lambda p, n: running.complete([p], model=n or BASE_NAME)[0], prompts, names)
        assert_each_alone(models, names, list(results))


def test_a_server_knows_adapters_by_the_names_of_models(server: Callable[..., Server], saved: tuple[Path, Models]) -> None:
    root, models = saved
    overrides = {"lmoe_adapters": {name: str(root / name) for name in ADAPTERS}}
    named = [f"{name}={path}" for name, path in paths(root).items()]
    settings = ["--enable-lora", "--max-loras", "5", "--lora-modules", *named]
    running = server(overrides, *settings, environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    running.wait_until_ready()
    with ThreadPoolExecutor(1) as others:
        unknown = {"model": "unknown", "prompt": [5, 6, 7], "max_tokens": 4}
        refused = others.submit(lambda: [running.post("/v1/completions", unknown)[0] for _ in range(20)])
        complete_all(running, models)
        assert set(refused.result()) == {404}

    for path in ("/nowhere", str(root), f"{root / 'math'}#scale=x"):
        status, answer = running.post("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path})
        assert status == 404, answer
    assert running.post("/v1/completions", {**unknown, "model": "new"})[0] == 404
    quarter = {"lora_name": "new", "lora_path": f"{root / 'text'}#scale=0.25"}
    assert running.post("/v1/load_lora_adapter", quarter)[0] == 200
    complete_all(running, {**models, "new": scaled(models["text"], 0.25)})


def test_a_server_without_lora_does_not_start(engine: Callable[..., Any], saved: tuple[Path, Models]) -> None:
    overrides = {"lmoe_adapters": {"math": str(saved[0] / "math")}}
    with pytest.raises(ValueError, match=r"^lmoe: enable_lora must be True with lmoe_adapters: .*, got False$"):
        engine(quantization="lmoe", hf_overrides=overrides)


def test_other_models_keep_the_manager_of_vllm() -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    install()
    config: Any = SimpleNamespace(quant_config=None)
    with pytest.raises(ValueError, match="Linear does not support LoRA yet"):  # vLLM's own check
        LoRAModelRunnerMixin().load_lora_model(nn.Linear(1, 1), config, torch.device("cpu"))


@pytest.mark.parametrize("change", ["a new method", "a renamed argument", "a removed method"])
def test_a_vllm_that_differs_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.engine.input_processor import InputProcessor

    if change == "a new method":
        name = "swap_adapter"
        monkeypatch.setattr(LRUCacheWorkerLoRAManager, name, lambda self: None, raising=False)
    elif change == "a renamed argument":
        name = "set_active_adapters"
        monkeypatch.setattr(LRUCacheWorkerLoRAManager, name, lambda self, requests, tokens: None)
    else:
        name = "_validate_lora"
        monkeypatch.delattr(InputProcessor, name)
    with pytest.raises(ValueError, match=f"^lmoe: vLLM must choose LoRA adapters as version .*, where {name} differ"):
        check_interface()
