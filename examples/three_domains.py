"""Train L-MoE layers on real text: one frozen language model learns three domains through eight experts.

A small Llama is trained briefly on English and frozen. Every linear layer of it then gets eight LoRA experts and a gate,
which learn English, Python and C together, on the language-modelling loss and a balance loss. For comparison, one LoRA with
as many trainable parameters is trained on the same batches. The script prints what each of them learned, which experts the
gates chose for which domain, and what a training step costs with the `torch` backend, with the literal definition, and with
the loop over eight PEFT LoRAs that most mixtures of LoRAs run.

    python examples/three_domains.py --out demo
"""

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Domain, load_domains
from costs import measure_costs
from peft import LoraConfig, get_peft_model
from pictures import domain_bits, most_specialised, plot_bits, plot_gates
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import lmoe_kernels as lk

NUM_EXPERTS, RANK = 8, 4
SCALINGS = {"L-MoE": 64.0, "one LoRA": 8.0}  # the best of each at this learning rate, see docs/defaults.md
RATE = 3e-3  # highest learning rate of every training
LENGTH = 128  # bytes in a window
WINDOWS = 12  # windows in a batch
BALANCE = 0.01  # weight of the balance loss


@dataclass(frozen=True)
class Budget:
    """Training steps, validation windows and timed steps of a run."""

    base_steps: int = 200
    adapter_steps: int = 200
    validation_windows: int = 96  # of each domain
    timed_steps: int = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare, measure, and write results.json, bits.png and gates.png."""
    args = parse_arguments(arguments)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT still uses the attribute's old name
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = Budget(2, 2, 2, 1) if args.tiny else Budget()
    started = time.perf_counter()
    domains = load_domains()

    torch.manual_seed(args.seed)
    base = small_llama()
    nn.Module.to(base, device)
    train("base on English", base, domains[:1], budget.base_steps, args.seed)
    base.requires_grad_(False)
    bits = {"base": bits_per_byte(base, domains, budget)}

    mixture = copy.deepcopy(base)
    alpha = SCALINGS["L-MoE"] * RANK
    lk.apply_lmoe(mixture, "all-linear", num_experts=NUM_EXPERTS, rank=RANK, alpha=alpha, output_router_logits=True)
    train("L-MoE, 8 experts", mixture, domains, budget.adapter_steps, args.seed, auxiliary_loss=balance)
    bits["L-MoE"] = bits_per_byte(mixture, domains, budget)
    lk.save_lmoe(mixture, out / "adapter")

    single = one_lora(copy.deepcopy(base), like=mixture)
    train("one LoRA", single, domains, budget.adapter_steps, args.seed)
    bits["one LoRA"] = bits_per_byte(single, domains, budget)

    gates = mean_gates(mixture, domains, budget)
    batch = mixed_batch(domains, torch.Generator().manual_seed(args.seed)).to(device)
    costs = measure_costs(base, mixture, batch, budget.timed_steps)
    results = {
        "bits_per_byte": bits,
        "trainable_parameters": {"L-MoE": trainable(mixture), "one LoRA": trainable(single)},
        "gates": {name: use.tolist() for name, use in gates.items()},
        "costs": costs,
        "settings": {"seed": args.seed, "device": device, "torch": torch.__version__, **vars(budget)},
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_bits(bits, out / "bits.png")
    plot_gates(gates, [domain.name for domain in domains], out / "gates.png")
    report(results, [domain.name for domain in domains], gates)
    print(f"\n{results['seconds']:.0f} s on {device}; wrote {out}/results.json, bits.png, gates.png and adapter/")


def small_llama() -> LlamaForCausalLM:
    """A Llama with 0.8 million random weights, whose tokens are bytes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def one_lora(model: nn.Module, like: nn.Module) -> nn.Module:
    """PEFT's LoRA on the same layers, of the rank whose number of parameters comes nearest to that of `like`."""
    features = sum(layer.in_features + layer.out_features for layer in lk.lmoe_layers(like).values())
    rank = round(trainable(like) / features)
    alpha = int(SCALINGS["one LoRA"] * rank)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))


def train(
    name: str,
    model: nn.Module,
    domains: Sequence[Domain],
    steps: int,
    seed: int,
    auxiliary_loss: Callable[[nn.Module], Tensor | float] = lambda model: 0.0,
) -> None:
    """Take all steps of `training`, with a progress bar."""
    losses = training(model, domains, steps, seed, auxiliary_loss)
    bar = tqdm(losses, total=steps, desc=f"{name:<17}", unit="step", file=sys.stderr)
    for loss in bar:
        bar.set_postfix_str(f"{loss / math.log(2):.2f} bits per byte", refresh=False)


def training(
    model: nn.Module,
    domains: Sequence[Domain],
    steps: int,
    seed: int,
    auxiliary_loss: Callable[[nn.Module], Tensor | float] = lambda model: 0.0,
    rate: float = RATE,
    windows: int = WINDOWS,
) -> Iterator[float]:
    """AdamW with warm-up to the learning rate `rate` and cosine decay, on batches that hold every domain in equal parts.

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
        loss = cross_entropy(model, mixed_batch(domains, generator, windows).to(device))
        optimizer.zero_grad(set_to_none=True)
        (loss + auxiliary_loss(model)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()


def balance(model: nn.Module) -> Tensor:
    """The load-balancing loss, weighted; without it some experts may never be used."""
    return BALANCE * lk.balance_loss(lk.collect_router_logits(model).values())


def mixed_batch(domains: Sequence[Domain], generator: torch.Generator, windows: int = WINDOWS) -> Tensor:
    """(windows, LENGTH + 1) bytes, the same number of windows from every domain."""
    return torch.cat([domain.batch(windows // len(domains), LENGTH, generator) for domain in domains])


def cross_entropy(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of each next byte, in nats."""
    logits = model(input_ids=windows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, domains: Sequence[Domain], budget: Budget) -> dict[str, float]:
    """Validation loss of every domain, in bits."""
    device = next(model.parameters()).device
    windows = {d.name: d.windows(budget.validation_windows, LENGTH).to(device) for d in domains}
    return {name: round(cross_entropy(model, w).item() / math.log(2), 4) for name, w in windows.items()}


@torch.no_grad()
def mean_gates(model: nn.Module, domains: Sequence[Domain], budget: Budget) -> dict[str, Tensor]:
    """How much of each expert every layer takes for each domain: layer name to (domains, E)."""
    device = next(model.parameters()).device
    use: dict[str, list[Tensor]] = {}
    for domain in domains:
        model(input_ids=domain.windows(budget.validation_windows, LENGTH)[:, :-1].to(device))
        for name, logits in lk.collect_router_logits(model).items():
            use.setdefault(name, []).append(logits.softmax(dim=-1).flatten(0, -2).mean(dim=0).cpu())
    return {name.removeprefix("model.layers."): torch.stack(rows) for name, rows in use.items()}


def trainable(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def report(results: dict, domains: Sequence[str], gates: dict[str, Tensor]) -> None:
    """Print what was measured as three tables."""
    parameters, bits = results["trainable_parameters"], results["bits_per_byte"]
    print()
    _line("Validation bits per byte", *domains, "mean", "trained parameters", width=10)
    for name, by_domain in bits.items():
        values = [*by_domain.values(), sum(by_domain.values()) / len(by_domain)]
        _line(f"  {name}", *(f"{value:.3f}" for value in values), parameters.get(name, ""), width=10)
    best, other = sorted(parameters, key=lambda name: sum(bits[name].values()))
    lead = sum(bits[other][domain] - bits[best][domain] for domain in domains) / len(domains)
    print(f"  lower is better: of the two adapters, {best} wins, by {lead:.3f}")

    print()
    _line("Mean gate of each expert, per cent", *range(NUM_EXPERTS), width=5)
    for layer in most_specialised(gates)[:3]:
        print(f"  {layer}: the choice of expert carries {domain_bits(gates[layer]):.3f} bits about the domain")
        for domain, row in zip(domains, gates[layer].tolist(), strict=True):
            _line(f"    {domain}", *(f"{100 * gate:.0f}" for gate in row), width=5)

    print()
    _line("One training step", "ms", "peak MiB", "saved bytes a token", width=12)
    for name, cost in results["costs"].items():
        _line(f"  {name}", cost["milliseconds"], cost["peak_mib"], cost["saved_bytes_per_token"], width=12)


def _line(label: str, *cells: object, width: int) -> None:
    """Print a row of a table: the label, then cells at least `width` wide."""
    print(f"{label:<33}" + "".join(f"{cell!s:>{max(width, len(str(cell)) + 2)}}" for cell in cells))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default="demo", help="folder for results.json, the pictures and the adapter (default: demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="a few steps only, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
