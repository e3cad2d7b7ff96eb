"""A base model in int8 (compressed-tensors): its method is wrapped, and the experts are added exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lmoe_kernels import lmoe_layers
from tests.vllm import mixed, tiny

_NUMBERS = {"num_bits": 8, "type": "int", "symmetric": True}
_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_NUMBERS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_NUMBERS, "strategy": "token", "dynamic": True},
        }
    },
}


@pytest.fixture
def plain(base: Path, tmp_path: Path) -> Path:
    """The directory of the tiny Llama with weights that int8 can hold, as plain numbers."""
    return tmp_path / "plain"


@pytest.fixture
def base(base: Path, plain: Path, tmp_path: Path) -> Path:
    """The same model in int8."""
    tensors, files = load_file(base / "model.safetensors"), [file for file in base.iterdir() if file.suffix == ".json"]
    quantised: dict[str, Tensor] = {}
    for name, weight in list(tensors.items()):
        quantised[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            quantised[name] = (weight / scale).round().to(torch.int8)
            quantised[f"{name}_scale"] = scale
            tensors[name] = quantised[name] * scale
    for directory, of_model in ((plain, tensors), (tmp_path / "int8", quantised)):
        directory.mkdir()
        save_file(of_model, directory / "model.safetensors", metadata={"format": "pt"})
        for file in files:
            (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    (tmp_path / "int8" / "config.json").write_text(json.dumps({**config, "quantization_config": _QUANTIZATION}))
    return tmp_path / "int8"


def _deltas(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """x and what the experts of each layer of vLLM's model add."""
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lmoe"):
            method: Any = layer.quant_method
            x = torch.randn(7, layer.lmoe.in_features)
            results[name] = x, method.apply(layer, x) - method.base.apply(layer, x)
    return results


def test_the_method_of_the_base_is_wrapped(base: Path, plain: Path, tmp_path: Path, engine, generate) -> None:
    model = mixed.save_adapter(plain, tmp_path / "adapter")
    llm = engine(tmp_path / "adapter")
    layers = lmoe_layers(model)
    [deltas] = llm.apply_model(_deltas)
    assert len(deltas) == 3 * 4 - 1  # the first block's down_proj has no experts
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for name, (x, delta) in deltas.items():
        parent, _, last = name.rpartition(".")
        parts = []
        for part in fused.get(last, [last]):
            layer = model.get_submodule(f"{parent}.{part}")
            with torch.no_grad():
                frozen = layer.frozen_layer(x) if f"{parent}.{part}" in layers else layer(x)
                parts.append(layer(x) - frozen)
        torch.testing.assert_close(delta, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-4)
    results = generate(llm, tiny.prompts(1, 5, 40))
    alone = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    print(tiny.agreement(model, results), tiny.agreement(alone, results))
    assert tiny.agreement(model, results) > 0.8
    assert tiny.agreement(alone, results) < 0.5


def test_each_request_gets_its_adapter(base: Path, plain: Path, tmp_path: Path, engine, generate) -> None:
    from vllm.lora.request import LoRARequest

    paths = {name: tmp_path / name for name in ("math", "code")}
    models = {n: tiny.save_adapter(plain, path, rank=rank) for (n, path), rank in zip(paths.items(), (3, 5), strict=True)}
    models["none"] = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    overrides = {"lmoe_adapters": {name: str(path) for name, path in paths.items()}}
    llm = engine(quantization="lmoe", hf_overrides=overrides, enable_lora=True, max_loras=2)
    requests = [LoRARequest(name, 1 + number, str(path)) for number, (name, path) in enumerate(paths.items())]
    results = generate(llm, tiny.prompts(1, 5, 40) * 3, lora_request=[*requests, None] * 3)
    for number, asked in enumerate([*paths, "none"]):
        for name, model in models.items():
            share = tiny.agreement(model, results[number::3])
            assert share > 0.8 if name == asked else share < 0.5, (asked, name)
