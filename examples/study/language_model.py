"""A small Llama of bytes, how it is trained, and how it is judged."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lmoe_kernels as lk

LENGTH = 128  # bytes in a window
WINDOWS = 12  # windows in a batch
RATE = 3e-3  # highest learning rate of every training
BALANCE = 0.01  # weight of the balance loss
AuxiliaryLoss = Callable[[nn.Module], Tensor | float]


class Source(Protocol):
    """Something that gives windows for training, such as a `Domain`."""

    def batch(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """`count` random windows, (count, length + 1) int64."""
        ...


def small_llama() -> LlamaForCausalLM:
    """A Llama with 0.8 million random weights, whose tokens are bytes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def none(model: nn.Module) -> float:
    """No auxiliary loss."""
    return 0.0


def training(
    model: nn.Module,
    sources: Sequence[Source],
    steps: int,
    seed: int,
    auxiliary_loss: AuxiliaryLoss = none,
    rate: float = RATE,
    windows: int = WINDOWS,
) -> Iterator[float]:
    """AdamW with warm-up to the learning rate `rate` and cosine decay, on batches that hold every source in equal parts.

    Yields:
        the loss of each step, in nats, without the auxiliary loss.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * i / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    device = parameters[0].device
    model.train()
    for _ in range(steps):
        loss = cross_entropy(model, mixed_batch(sources, generator, windows).to(device))
        optimizer.zero_grad(set_to_none=True)
        (loss + auxiliary_loss(model)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()


def balance(model: nn.Module) -> Tensor:
    """The load-balancing loss, weighted."""
    return BALANCE * lk.balance_loss(lk.collect_router_logits(model).values())


def mixed_batch(sources: Sequence[Source], generator: torch.Generator, windows: int = WINDOWS) -> Tensor:
    """(windows, LENGTH + 1) bytes, the same number of windows from every source."""
    return torch.cat([source.batch(windows // len(sources), LENGTH, generator) for source in sources])


def cross_entropy(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of each next byte, in nats."""
    logits = model(input_ids=windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: dict[str, Tensor]) -> dict[str, float | None]:
    """Loss of every domain, in bits; None where it is not finite."""
    device = next(model.parameters()).device
    nats = {name: cross_entropy(model, of_domain.to(device)).item() for name, of_domain in windows.items()}
    return {name: round(n / math.log(2), 4) if math.isfinite(n) else None for name, n in nats.items()}


def trainable(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
