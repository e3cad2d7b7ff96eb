"""What a mixture of LoRA experts does on real text: English, Python and C, on a small frozen language model.

A small Llama is trained briefly on English and frozen. Then the script shows two uses of the experts.

- Trained apart: three LoRAs, each trained on one domain alone, become the experts of one model. What picks the expert: no
  gate (their average), a gate in every layer that reads one token, or one router for each block that reads the running mean
  of the prefix? The oracle gives every domain its own LoRA. One LoRA that was trained on all domains shows what it is worth
  to have all the data at once.
- Trained together: gate and experts learn all domains at once, against one LoRA with as many parameters, each at the
  learning rate and scaling that suit it.

It draws bars of both, and which experts the gates chose for which domain, and measures what a training step costs.

    python examples/three_domains.py --out demo
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import Domain, load_domains
from costs import measure_costs
from pictures import domain_bits, plot_bits, plot_gates
from study.adapters import composed, experts_of, mixture, one_lora
from study.language_model import (
    LENGTH,
    RATE,
    WINDOWS,
    AuxiliaryLoss,
    balance,
    bits_per_byte,
    mixed_batch,
    none,
    small_llama,
    trainable,
    training,
)
from torch import Tensor, nn
from tqdm import tqdm

import lmoe_kernels as lk

RANK, SCALING = 16, 8.0  # of each LoRA that is trained apart
# What is trained together: rank and scaling, tuned for 100 steps at this learning rate in docs/defaults.md. One LoRA of rank
# 36 has as many parameters as 8 experts of rank 4 and their gates.
TOGETHER = {"one LoRA": (36, 8.0), "factors": (4, 64.0), "outputs": (4, 64.0)}
GATE_RATE = 1e-2
TOKEN, PREFIX = "gate per layer, on the token", "router per block, on the prefix"
ROUTERS: dict[str, dict[str, Any]] = {TOKEN: {}, PREFIX: {"router": "block", "router_reads": "prefix"}}
AVERAGE, ORACLE = "average of the LoRAs", "oracle: each domain's own LoRA"
EVERYTHING = "one LoRA trained on everything"


@dataclass(frozen=True)
class Budget:
    """Training steps, validation windows and timed steps of a run."""

    base_steps: int = 200  # of 12 windows
    lora_steps: int = 100  # of 6 windows, each LoRA that is trained apart
    gate_steps: int = 40  # of 12 windows
    joint_steps: int = 100  # of 6 windows
    validation_windows: int = 48  # of each domain
    timed_steps: int = 5
    timed_windows: int = WINDOWS  # in the batch of a timed step


class Demo:
    """The frozen model, and what is trained on it."""

    def __init__(self, budget: Budget, seed: int, device: str) -> None:
        self.budget, self.seed, self.device = budget, seed, device
        self.domains = load_domains()
        self.windows = {domain.name: domain.windows(budget.validation_windows, LENGTH) for domain in self.domains}
        torch.manual_seed(seed)
        base = small_llama()
        nn.Module.to(base, device)
        self.train("base on English", base, self.domains[:1], budget.base_steps, windows=WINDOWS)
        self.base = base.requires_grad_(False)

    def train(
        self,
        name: str,
        model: nn.Module,
        domains: Sequence[Domain],
        steps: int,
        auxiliary_loss: AuxiliaryLoss = none,
        rate: float = RATE,
        windows: int = 6,
    ) -> None:
        """Train what is not frozen, with a progress bar."""
        losses = training(model, domains, steps, self.seed, auxiliary_loss, rate, windows)
        bar = tqdm(losses, total=steps, desc=f"{name:<31}", unit="step", file=sys.stderr)
        for loss in bar:
            bar.set_postfix_str(f"{loss / math.log(2):.2f} bits per byte", refresh=False)

    def apart(self) -> tuple[dict[str, dict[str, float]], dict[str, int], dict[str, nn.Module]]:
        """Train a LoRA on each domain and compose them: bits per byte, trained parameters, and the models with gates."""
        bits, parameters, routed = {"frozen model": self.bits(self.base)}, dict[str, int](), dict[str, nn.Module]()
        loras, own = {}, {}
        for domain in self.domains:
            lora = one_lora(self.base, RANK, SCALING, self.seed)
            self.train(f"LoRA on {domain.name}", lora, [domain], self.budget.lora_steps)
            loras[domain.name] = experts_of(lora)
            own[domain.name] = self.bits(lora)[domain.name]
        bits[AVERAGE] = self.bits(composed(self.base, loras, SCALING))
        for name, routing in ROUTERS.items():
            model = composed(self.base, loras, SCALING, **routing)
            self.train(name, model, self.domains, self.budget.gate_steps, rate=GATE_RATE, windows=WINDOWS)
            bits[name], parameters[name], routed[name] = self.bits(model), trainable(model), model
        bits[ORACLE] = own
        everything = one_lora(self.base, RANK * len(loras), SCALING, self.seed)
        self.train(EVERYTHING, everything, self.domains, self.budget.lora_steps * len(loras))
        bits[EVERYTHING], parameters[EVERYTHING] = self.bits(everything), trainable(everything)
        return bits, parameters, routed

    def together(self) -> tuple[dict[str, dict[str, float]], dict[str, int], dict[str, nn.Module]]:
        """Train gate and experts at once, and one LoRA: bits per byte, trained parameters, and the models."""
        models: dict[str, nn.Module] = {}
        for name, (rank, scaling) in TOGETHER.items():
            if name == "one LoRA":
                models[name] = one_lora(self.base, rank, scaling, self.seed)
            else:
                mixing: Any = name
                models[name] = mixture(self.base, mixing, scaling, self.seed, rank=rank)
            loss = none if name == "one LoRA" else balance
            self.train(f"together: {name}", models[name], self.domains, self.budget.joint_steps, loss)
        bits = {name: self.bits(model) for name, model in models.items()}
        return bits, {name: trainable(model) for name, model in models.items()}, models

    def bits(self, model: nn.Module) -> dict[str, Any]:
        """Validation loss of every domain, in bits per byte."""
        return bits_per_byte(model, self.windows)

    @torch.no_grad()
    def gates(self, model: nn.Module) -> dict[str, Tensor]:
        """How much of each expert every layer takes for each domain: layer to (domains, E). Layers of a router are one."""
        use: dict[str, list[Tensor]] = {}
        shared = any(layer.router is not None for layer in lk.lmoe_layers(model).values())
        for windows in self.windows.values():
            model(input_ids=windows[:, :-1].to(self.device))
            logits = lk.collect_router_logits(model)
            for shown, name in {"block " + name.split(".")[2] if shared else name: name for name in logits}.items():
                use.setdefault(shown, []).append(logits[name].softmax(dim=-1).flatten(0, -2).mean(dim=0).cpu())
        return {name.removeprefix("model.layers."): torch.stack(rows) for name, rows in use.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare, measure, and write results.json, bits.png and gates.png."""
    args = parse_arguments(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    demo = Demo(Budget(2, 2, 2, 2, 2, 1, 3) if args.tiny else Budget(), args.seed, device)
    apart, parameters, routed = demo.apart()
    together, joint_parameters, joint = demo.together()
    lk.save_lmoe(routed[PREFIX], out / "adapter")

    gates = {name: demo.gates(model) for name, model in {"trained together, outputs": joint["outputs"], **routed}.items()}
    batch = mixed_batch(demo.domains, torch.Generator().manual_seed(args.seed), demo.budget.timed_windows).to(device)
    costs = measure_costs(demo.base, joint["factors"], batch, demo.budget.timed_steps)
    results = {
        "bits_per_byte": {"apart": apart, "together": together},
        "trained_parameters": {**parameters, **joint_parameters},
        "gates": {name: {layer: use.tolist() for layer, use in of_layer.items()} for name, of_layer in gates.items()},
        "costs": costs,
        "settings": {"seed": args.seed, "device": device, "torch": torch.__version__, **vars(demo.budget)},
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_bits(apart, together, out / "bits.png")
    plot_gates(gates, [domain.name for domain in demo.domains], out / "gates.png")
    report(results, gates, [domain.name for domain in demo.domains])
    print(f"\n{results['seconds']:.0f} s on {device}; wrote {out}/results.json, bits.png, gates.png and adapter/")


def report(results: dict[str, Any], gates: dict[str, dict[str, Tensor]], domains: Sequence[str]) -> None:
    """Print what was measured as four tables."""
    apart, together = results["bits_per_byte"]["apart"], results["bits_per_byte"]["together"]
    parameters = results["trained_parameters"]
    for title, bits in (("LoRAs trained apart, composed", apart), ("Gate and experts trained together", together)):
        print()
        _line(f"{title}, bits per byte", *domains, "mean", "trained parameters", width=10)
        for name, by_domain in bits.items():
            values = [*by_domain.values(), mean_of(by_domain)]
            _line(f"  {name}", *(f"{value:.3f}" for value in values), parameters.get(name, ""), width=10)
        print(f"  {sentence_apart(apart) if bits is apart else sentence_together(together)}")

    print()
    _line("Bits that the expert tells about the domain", "best layer", "mean of layers", width=10)
    for name, of_layer in gates.items():
        bits = [domain_bits(use) for use in of_layer.values()]
        _line(f"  {name}", f"{max(bits):.3f}", f"{sum(bits) / len(bits):.3f}", width=10)
    print(f"  {math.log2(len(domains)):.3f} if each domain had its own expert, 0 if all used the same")

    print()
    _line("One training step", "ms", "peak MiB", "saved bytes a token", width=12)
    for name, cost in results["costs"].items():
        _line(f"  {name}", cost["milliseconds"], cost["peak_mib"], cost["saved_bytes_per_token"], width=12)


def sentence_apart(bits: dict[str, dict[str, float]]) -> str:
    """How far the gates go from the average to the oracle, and who wins over all."""
    average, oracle = mean_of(bits[AVERAGE]), mean_of(bits[ORACLE])
    token, prefix = ((average - mean_of(bits[name])) / (average - oracle) for name in ROUTERS)
    best = min(bits, key=lambda name: mean_of(bits[name]))
    return (
        f"Lower is better. From the average to the oracle, a gate on the token goes {100 * token:.0f} % of the way, "
        f"a router on the prefix {100 * prefix:.0f} %.\n  Best of all: {best}."
    )


def sentence_together(bits: dict[str, dict[str, float]]) -> str:
    """Who wins, and by how much."""
    first, second = sorted(bits, key=lambda name: mean_of(bits[name]))[:2]
    lead = mean_of(bits[second]) - mean_of(bits[first])
    return f"Lower is better: {first} wins, {lead:.3f} ahead of {second}. That is one seed; docs/evidence.md has three."


def mean_of(bits: dict[str, float]) -> float:
    """The mean over the domains."""
    return sum(bits.values()) / len(bits)


def _line(label: str, *cells: object, width: int) -> None:
    """Print a row of a table: the label, then cells at least `width` wide."""
    print(f"{label:<51}" + "".join(f"{cell!s:>{max(width, len(str(cell)) + 2)}}" for cell in cells))


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
