"""What `RoutingStats` adds to a training step of a Llama on the CPU, in process time on one thread.

    python -m benchmarks.inspect.routing_stats

Steps with and without statistics alternate, and the medians are compared. Since the difference is smaller than the noise of
a step on a shared machine, the time within the hook of the statistics is measured too.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lmoe_kernels as lk
from lmoe_kernels.routing import RoutingStats


def llama(hidden: int, layers: int) -> nn.Module:
    """A Llama with experts in every linear layer."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    lk.apply_lmoe(model, "all-linear", num_experts=8, rank=16)
    return model


class Timed(RoutingStats):
    """Statistics that measure the time within their own hook."""

    seconds = 0.0

    def _count(self, batch: dict[str, Any]) -> None:
        started = time.process_time()
        super()._count(batch)
        self.seconds += time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = llama(args.hidden, args.layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 1024, (2, args.tokens // 2))
    plain, inside, hook = [], [], []
    step(model, optimizer, ids)
    for _ in range(args.steps):
        plain.append(step(model, optimizer, ids))
        stats = Timed(model)
        with stats:
            inside.append(step(model, optimizer, ids))
        hook.append(stats.seconds)
    without, within, own = (statistics.median(times) for times in (plain, inside, hook))
    layers = len(lk.lmoe_layers(model))
    print(f"{layers} layers with experts, hidden size {args.hidden}, {args.tokens} tokens, {args.steps} steps")
    print(f"a training step: {without:.3f} s, with statistics {within:.3f} s ({100 * (within / without - 1):+.2f} %)")
    print(f"the hook of the statistics: {1000 * own:.1f} ms ({100 * own / without:.2f} %)")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Take one training step, and return its process time in seconds."""
    started = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - started


if __name__ == "__main__":
    main()
