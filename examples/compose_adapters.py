"""Compose LoRAs that were trained separately: three of PEFT, one for each kind of text, become the experts of one model.

A small Llama is trained briefly on English and frozen. PEFT trains three LoRAs of different ranks on it: one on English, one
on Python, one on C. `from_lora_adapters` makes them the experts of one model, whose gates alone are then trained for a few
steps on all three. The script prints what each LoRA does alone, what their average does, and what the trained gates make of
them. Then it exports an expert, which PEFT loads again.

    python examples/compose_adapters.py --out composed
"""

import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import Domain, load_domains
from peft import LoraConfig, PeftModel, get_peft_model
from study.language_model import LENGTH, cross_entropy, small_llama, training
from torch import nn
from tqdm import tqdm

import lmoe_kernels as lk

# All have a scaling of 8, which suits this learning rate (docs/defaults.md).
LORAS: dict[str, dict[str, Any]] = {
    "English": {"r": 8, "lora_alpha": 64},
    "Python": {"r": 16, "lora_alpha": 32, "use_rslora": True},
    "C": {"r": 4, "lora_alpha": 32},
}
GATE_RATE = 1e-2  # learning rate of the gates


@dataclass(frozen=True)
class Budget:
    """Training steps and validation windows of a run."""

    base_steps: int = 200
    lora_steps: int = 100  # of each LoRA
    gate_steps: int = 50
    validation_windows: int = 48  # of each domain


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the LoRAs, compose them, train the gates, export an expert, and write results.json."""
    args = parse_arguments(arguments)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT still uses the attribute's old name
    out, budget = Path(args.out), Budget(2, 2, 2, 2) if args.tiny else Budget()
    started, domains = time.perf_counter(), load_domains()
    torch.manual_seed(args.seed)
    base = small_llama()
    train("base on English", base, domains[:1], budget.base_steps, args.seed)
    base.requires_grad_(False)
    bits = {"base model": bits_per_byte(base, domains, budget)}
    for domain in domains:
        lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", **LORAS[domain.name]))
        train(f"LoRA on {domain.name}", lora, [domain], budget.lora_steps, args.seed)
        lora.save_pretrained(str(out / "loras" / domain.name))
        bits[f"LoRA of {domain.name}"] = bits_per_byte(lora, domains, budget)

    model = copy.deepcopy(base)
    lk.from_lora_adapters(model, [out / "loras" / domain.name for domain in domains])
    bits["average of the three"] = bits_per_byte(model, domains, budget)
    for layer in lk.lmoe_layers(model).values():
        layer.lora_a.requires_grad_(False)  # the experts stay as they are; only the gates are trained
        layer.lora_b.requires_grad_(False)
    train("gates on all three", model, domains, budget.gate_steps, args.seed, GATE_RATE)
    bits["gates, trained"] = bits_per_byte(model, domains, budget)
    bits["the right LoRA for each"] = {domain.name: bits[f"LoRA of {domain.name}"][domain.name] for domain in domains}
    lk.save_lmoe(model, out / "mixture")

    lk.export_expert(model, "Python", out / "exported")
    window = domains[1].windows(1, LENGTH)[:, :-1]
    first, again = (PeftModel.from_pretrained(copy.deepcopy(base), out / path) for path in ("loras/Python", "exported"))
    with torch.no_grad():
        difference = (first(window).logits - again(window).logits).abs().max().item()
    results = {
        "bits_per_byte": bits,
        "trained_gate_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "largest_difference_of_exported_logits": difference,
        "settings": {"seed": args.seed, "torch": torch.__version__, **vars(budget)},
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report(results, [domain.name for domain in domains])
    print(f"\n{results['seconds']:.0f} s; wrote {out}/results.json, loras/, mixture/ and exported/")


def train(name: str, model: nn.Module, domains: Sequence[Domain], steps: int, seed: int, rate: float = 3e-3) -> None:
    """Train what is not frozen, with a progress bar."""
    for _ in tqdm(
        training(model, domains, steps, seed, rate=rate), total=steps, desc=f"{name:<18}", unit="step", file=sys.stderr
    ):
        pass


@torch.no_grad()
def bits_per_byte(model: nn.Module, domains: Sequence[Domain], budget: Budget) -> dict[str, float]:
    """Validation loss of every domain, in bits."""
    windows = {domain.name: domain.windows(budget.validation_windows, LENGTH) for domain in domains}
    return {name: round(cross_entropy(model, w).item() / math.log(2), 4) for name, w in windows.items()}


def report(results: dict[str, Any], domains: Sequence[str]) -> None:
    """Print the table."""
    print("\nValidation bits per byte" + "".join(f"{name:>10}" for name in (*domains, "mean")))
    for name, by_domain in results["bits_per_byte"].items():
        values = [*by_domain.values(), sum(by_domain.values()) / len(by_domain)]
        print(f"  {name:<22}" + "".join(f"{value:>10.3f}" for value in values))
    print("  Lower is better. The last row takes for each text the LoRA of its domain, which no gate was given.")
    difference = results["largest_difference_of_exported_logits"]
    print(f"The exported expert, loaded by PEFT, differs from the LoRA that was imported by {difference:.1e} in its logits.")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="composed", help="folder for results.json and the adapters (default: composed)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="a few steps only, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
