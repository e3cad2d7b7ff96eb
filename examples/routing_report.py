"""See what the gates of a model do: statistics by domain, under `generate` too, drift over training, and text by expert.

A small Llama with random weights gets four experts in every linear layer and is trained for a few steps on English, Python
and C. Meanwhile `RoutingStats` adds up its router logits on the device. The script writes the statistics and an HTML page:

    python examples/routing_report.py --out routing
    python -m lmoe_kernels.routing report routing      # writes the page again from the statistics
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import Domain, load_domains
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lmoe_kernels as lk
from lmoe_kernels.routing import RoutingStats, routing_of_text, write_report

LENGTH = 96  # bytes in a window


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, count, and write the statistics and the report."""
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    domains = load_domains()
    model: Any = llama_with_experts()  # so that a type checker sees its `generate`
    model.to(device)
    steps, windows = (4, 2) if args.tiny else (60, 16)

    stats = RoutingStats(model, labels=[domain.name for domain in domains])
    train(model, domains, steps, stats)
    with stats, torch.no_grad():
        for domain in domains:
            ids = domain.windows(windows, LENGTH)[:, :-1].to(device)
            with stats.label(domain.name):
                model(input_ids=ids)
                model.generate(ids[:2, :32], max_new_tokens=16, do_sample=False, pad_token_id=0)
    for domain in domains:
        ids = domain.windows(3, 4 * LENGTH)[1].to(device)
        stats.texts.append(routing_of_text(model, ids, to_text, title=f"{domain.name} by expert"))

    out = Path(args.out)
    stats.save(out)
    write_report(stats, out / "report.html", title="What the gates do: English, Python and C")
    report(stats)
    print(f"wrote {out}/routing.safetensors, routing.json and report.html")


def llama_with_experts() -> LlamaForCausalLM:
    """A Llama with random weights, whose tokens are bytes, with experts in every linear layer."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=4 * LENGTH, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    lk.apply_lmoe(model, "all-linear", num_experts=4, rank=4)
    model.requires_grad_(True)  # random weights are worth training too
    return model


def train(model: nn.Module, domains: Sequence[Domain], steps: int, stats: RoutingStats) -> None:
    """Train on windows of all domains, which are labelled by sequence, with a snapshot for each quarter of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    labels = torch.arange(len(domains), device=device).repeat_interleave(4)
    model.train()
    with stats, stats.label(labels):
        for step in range(1, steps + 1):
            ids = torch.cat([domain.batch(4, LENGTH, generator) for domain in domains]).to(device)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % (steps // 4) == 0:
                stats.snapshot(step)
    model.eval()


def to_text(ids: list[int]) -> str:
    """The text of one token, a byte."""
    return bytes(ids).decode("latin-1")


def report(stats: RoutingStats) -> None:
    """Print the layers whose gates tell most about the domain."""
    summary = stats.summary()
    print(f"{'layer':<36}{'bits':>8}{'effective experts':>20}{'experts per token':>20}")
    for name in sorted(summary, key=lambda name: -summary[name]["label_bits"])[:5]:
        of_layer = summary[name]
        counts = f"{of_layer['effective_experts']:>20.2f}{of_layer['experts_per_token']:>20.2f}"
        print(f"{name:<36}{of_layer['label_bits']:>8.4f}{counts}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="routing", help="folder for the statistics and the report (default: routing)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="a few steps only, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
