"""What the start of vLLM refuses, each with one line, before it reads the weights of the base model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lmoe_kernels import apply_lmoe, save_lmoe


def _adapter(target: str = "q_proj", change: Callable[[LlamaConfig], object] = id, **options: Any):
    def save(base: Path, directory: Path) -> None:
        config = LlamaConfig.from_pretrained(base)
        change(config)
        model = LlamaForCausalLM(config)
        apply_lmoe(model, target, num_experts=2, rank=2, **options)
        save_lmoe(model, directory)

    return save


def _wider(config: LlamaConfig) -> None:
    config.intermediate_size = 160


def _deeper(config: LlamaConfig) -> None:
    config.num_hidden_layers = 4


REFUSED: dict[str, tuple[Callable[[Path, Path], object], dict[str, Any], str]] = {
    "no directory": (
        lambda base, directory: None,
        {},
        "lmoe: lmoe_adapter of --hf-overrides must be a directory that save_lmoe wrote, got '",
    ),
    "an empty directory": (lambda base, directory: directory.mkdir(), {}, "does not exist"),
    "another method": (
        _adapter(),
        {"quantization": None},
        "lmoe: quantization must be 'lmoe' with lmoe_adapter in --hf-overrides, got None",
    ),
    "modules_to_save": (
        _adapter(modules_to_save="lm_head"),
        {},
        "lmoe: an adapter must contain no other trained modules (modules_to_save), got 'lm_head.weight'",
    ),
    "a router of the block": (
        _adapter(router="block"),
        {},
        "lmoe: layer 'model.layers.0.self_attn.q_proj' must have a router that reads the layer's own tokens "
        "(router='layer' or 'group'), got router='block', router_reads='token'",
    ),
    "online quantization": (
        _adapter(),
        {"quantization_config": {"linear": "fp8_per_tensor"}},
        "lmoe: quantization_config must be None",
    ),
    "another base's features": (
        _adapter("down_proj", _wider),
        {},
        "lmoe: layer 'model.layers.0.mlp.down_proj' must have 160 features in and 64 out, "
        "as the base model of its adapter, got 96 and 64",
    ),
    "a layer too many": (
        _adapter("q_proj", _deeper),
        {},
        "lmoe: layer 'model.layers.3.self_attn.q_proj' of an adapter must be a linear layer of the model in vLLM, "
        "got none of that name",
    ),
    "the head alone": (
        _adapter("lm_head"),
        {},
        "lmoe: layer 'lm_head' of an adapter must be a linear layer of the model in vLLM, got none of that name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_at_the_start(case: str, base: Path, tmp_path: Path, engine) -> None:
    save, options, message = REFUSED[case]
    save(base, tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        engine(tmp_path / "adapter", **options)
    [line] = [line for line in str(error.value).splitlines() if "lmoe: " in line]
    assert message in line
