"""A tiny Llama with a tokenizer, adapters for it, and what transformers says about the tokens that vLLM generated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmoe_kernels import apply_lmoe, lmoe_layers, save_lmoe

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH = 256  # the longest sequence


class Generated(NamedTuple):
    """What vLLM generated after a prompt, greedily."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # one for each of the tokens


def save_base(directory: Path) -> Path:
    """A random Llama with a tokenizer that has one token for each byte. vLLM's attention on CPUs needs heads of 32."""
    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=LENGTH, initializer_range=0.1, pad_token_id=0,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def with_experts(base: Path, targets: Sequence[str] = ALL_SEVEN, **options: Any) -> LlamaForCausalLM:
    """The model in fp32 with random experts, large enough that it generates other tokens than the base alone."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    apply_lmoe(model, list(targets), **({"num_experts": 4, "rank": 8} | options))
    change_experts(model)
    return model.eval()


def change_experts(model: nn.Module) -> None:
    """Draw all experts and gates again."""
    with torch.no_grad():
        for layer in lmoe_layers(model).values():
            layer.lora_a.normal_(std=layer.in_features**-0.5)
            layer.lora_b.normal_(std=layer.rank**-0.5 / layer.scaling)
            for name, value in layer.gate(layer.active()[0]).items():
                value.normal_(std=layer.in_features**-0.5 if name == "gate_weight" else 0.5)


def save_adapter(base: Path, directory: Path, targets: Sequence[str] = ALL_SEVEN, **options: Any) -> LlamaForCausalLM:
    """Save the experts of such a model and return it."""
    model = with_experts(base, targets, **options)
    save_lmoe(model, directory)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    """Random tokens, without those that pad or end a sequence."""
    return [torch.randint(2, 258, (length,)).tolist() for length in lengths]


@torch.no_grad()
def logprobs_of(model: nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The log-probabilities (tokens, vocabulary) from which each of the tokens was drawn."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def assert_generated_by(model: nn.Module, results: Sequence[Generated], tolerance: float = 1e-5) -> None:
    """Fail unless every token is the model's most probable one, with the model's log-probability.

    The model reads the tokens that vLLM generated. It does not generate by itself: two tokens whose probabilities differ by
    rounding alone may be exchanged, and everything after them would differ.
    """
    for result in results:
        expected = logprobs_of(model, result.prompt, result.tokens)
        of_tokens = expected[torch.arange(len(result.tokens)), torch.tensor(result.tokens)]
        assert (expected.amax(-1) - of_tokens).amax() <= tolerance, f"another token after {len(result.prompt)} tokens"
        error = (of_tokens - torch.tensor(result.logprobs)).abs().amax()
        assert error <= tolerance, f"log-probabilities differ by {error:.2e} after {len(result.prompt)} tokens"


def agreement(model: nn.Module, results: Sequence[Generated]) -> float:
    """The share of the tokens that are the model's most probable ones, for models that must not agree."""
    equal = [logprobs_of(model, r.prompt, r.tokens).argmax(-1) == torch.tensor(r.tokens) for r in results]
    return torch.cat(equal).float().mean().item()
