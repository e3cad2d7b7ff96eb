"""What is compared: the model, the adapters, and the engines that serve them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.serving.labels import EXPERTS, RANK, TARGETS
from lmoe_kernels import apply_lmoe, lmoe_layers, save_lmoe

VOCABULARY, LENGTH = 4096, 512


class Row(NamedTuple):
    """An engine."""

    adapter: str  # "", "lmoe" or "lora"
    eager: bool
    on: tuple[str, ...] = ("cpu", "cuda")  # devices


ROWS = {
    "base": Row("", eager=False),
    "lmoe": Row("lmoe", eager=False),
    "lora": Row("lora", eager=False, on=("cuda",)),
    "base-eager": Row("", eager=True),
    "lmoe-eager": Row("lmoe", eager=True),
    "lora-eager": Row("lora", eager=True),
}


def options_of(row: Row, folder: Path, device: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM`. The engines of all rows share a device."""
    options: dict[str, Any] = {
        "model": str(folder / "base"), "dtype": "bfloat16", "enforce_eager": row.eager, "max_model_len": LENGTH,
        "max_num_batched_tokens": 4096, "max_num_seqs": 64, "enable_prefix_caching": False, "disable_log_stats": True,
    }  # fmt: skip
    if device == "cuda":
        options["gpu_memory_utilization"] = 0.12
    if row.adapter == "lmoe":
        options |= {"quantization": "lmoe", "hf_overrides": {"lmoe_adapter": str(folder / "lmoe")}}
    if row.adapter == "lora":
        options |= {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1}
    return options


def write_models(
    folder: Path, *, layers: int = 8, width: int = 1024, vocabulary: int = VOCABULARY
) -> dict[str, LlamaForCausalLM]:
    """Write the base and the adapters; return what they should compute, in fp32, by the name of the adapter."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 256),
        max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(folder / "base")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder / "base")
    models = {name: LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32) for name in ("", "lmoe", "lora")}
    _save_experts(models["lmoe"], folder / "lmoe")
    _save_lora(models["lora"], folder / "lora")
    return {name: model.eval() for name, model in models.items()}


@torch.no_grad()
def _save_experts(model: LlamaForCausalLM, directory: Path) -> None:
    apply_lmoe(model, list(TARGETS), num_experts=EXPERTS, rank=RANK)
    for layer in lmoe_layers(model).values():
        for parameter, std in ((layer.lora_a, layer.in_features**-0.5), (layer.lora_b, RANK**-0.5 / layer.scaling)):
            parameter.copy_(_drawn(parameter.shape, std))
        for value in layer.gate(layer.active()[0]).values():
            value.copy_(_drawn(value.shape, layer.in_features**-0.5))
    save_lmoe(model, directory)


@torch.no_grad()
def _save_lora(model: LlamaForCausalLM, directory: Path) -> None:
    """A LoRA in PEFT's format, and the model with its weights added to those of the base."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            weight: Tensor = module.weight  # type: ignore[assignment]
            lora_a, lora_b = _drawn((RANK, weight.shape[1]), weight.shape[1] ** -0.5), _drawn((weight.shape[0], RANK), 0.1)
            tensors |= {f"base_model.model.{name}.lora_A.weight": lora_a, f"base_model.model.{name}.lora_B.weight": lora_b}
            weight += lora_b @ lora_a
    directory.mkdir()
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _drawn(shape: Any, std: float) -> Tensor:
    """Random numbers that bf16 can hold, so that the references read what the engines read."""
    return (torch.randn(shape) * std).to(torch.bfloat16).float()


@torch.no_grad()
def mean_error(model: LlamaForCausalLM, prompt: list[int], tokens: list[int], logprobs: list[float]) -> float:
    """How far, on average, the log-probabilities of generated tokens are from those of a model."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    return (expected - torch.tensor(logprobs)).abs().mean().item()
