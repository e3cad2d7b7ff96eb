"""The demo's two pictures: what was gained, and which experts the gates chose for which domain."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

COLOURS = {"mixture with a gate": "#cc6677", "one LoRA": "#4477aa", "without a gate": "#999999"}
Bits = dict[str, dict[str, float]]


def domain_bits(use: Tensor) -> float:
    """How much the choice of an expert tells about the domain, in bits: mutual information, all domains equally likely.

    Args:
        use: (domains, E), mean gates, rows summing to one.
    """
    ratio = use / use.mean(dim=0)
    return torch.where(use > 0, use * ratio.log2(), 0.0).sum(dim=1).mean().item()


def most_specialised(gates: dict[str, Tensor]) -> list[str]:
    """Layer names, sorted so that those whose choice of experts differs most between the domains come first."""
    return sorted(gates, key=lambda name: -domain_bits(gates[name]))


def plot_bits(apart: Bits, together: Bits, path: Path) -> None:
    """Bars of how many bits per byte each model saves over the frozen one; the first row of `apart` is the frozen one."""
    means = {name: sum(bits.values()) / len(bits) for name, bits in {**apart, **together}.items()}
    frozen = means[next(iter(apart))]
    names = [[name for name in part if means[name] != frozen] for part in (apart, together)]
    figure, panels = plt.subplots(
        2, 1, figsize=(8.5, 4.8), sharex=True, layout="constrained", height_ratios=[len(part) for part in names]
    )
    titles = (
        "LoRAs trained apart, one on each domain, then composed",
        "Trained together on all domains, parameters of equal number",
    )
    for axes, part, title in zip(panels, names, titles, strict=True):
        saved = [frozen - means[name] for name in part]
        bars = axes.barh(part, saved, 0.7, color=[COLOURS[_kind(name)] for name in part])
        axes.bar_label(bars, [f"{means[name]:.3f}" for name in part], padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(min(0.0, *saved), 1.12 * max(frozen - mean for mean in means.values()))
    panels[1].set_xlabel(f"bits per byte less than the frozen model's {frozen:.3f}: longer is better")
    patches = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _kind(name: str) -> str:
    """Which of the colours a row has."""
    if "one LoRA" in name:
        return "one LoRA"
    return "without a gate" if name.startswith(("average", "oracle")) else "mixture with a gate"


def plot_gates(gates: dict[str, dict[str, Tensor]], domains: list[str], path: Path) -> None:
    """A heat map for each model, domains by experts, of the layer or block whose choice tells most about the domain."""
    figure, panels = plt.subplots(
        1, len(gates), figsize=(12, 3.4), layout="constrained",
        width_ratios=[3 + next(iter(of_layer.values())).shape[1] for of_layer in gates.values()],
    )  # fmt: skip
    for axes, (model, of_layer) in zip(panels, gates.items(), strict=True):
        best = most_specialised(of_layer)[0]
        use = of_layer[best]
        axes.imshow(use, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        apart = use.shape[1] == len(domains)
        axes.set_xticks(range(use.shape[1]), domains if apart else range(use.shape[1]))
        axes.set_yticks(range(len(domains)), domains)
        axes.set_xlabel("expert" if not apart else "expert, trained on")
        mean = sum(map(domain_bits, of_layer.values())) / len(of_layer)
        axes.set_title(f"{model}\n{best}: {domain_bits(use):.2f} bits (mean {mean:.2f})", fontsize=8.5, loc="left")
        for row, shares in enumerate(use.tolist()):
            for column, share in enumerate(shares):
                ink = "black" if share > 0.6 else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=9)
    panels[0].set_ylabel("text")
    title = (
        "Mean gate in per cent, in the layer that tells most about the domain; bits: its mutual information with the domain"
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
