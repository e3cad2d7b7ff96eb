"""The demo's two pictures: what was learned, and which experts the gates chose for which domain."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"base": "#bbbbbb", "one LoRA": "#4477aa", "L-MoE": "#ee6677"}
SHOWN = 6  # layers whose gates are drawn


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


def plot_bits(bits: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of validation bits per byte: domains side by side, the models within each."""
    domains = list(next(iter(bits.values())))
    order = [name for name in COLOURS if name in bits]
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    width = 0.8 / len(order)
    for i, name in enumerate(order):
        places = [d + (i - (len(order) - 1) / 2) * width for d in range(len(domains))]
        bars = axes.bar(places, [bits[name][d] for d in domains], width * 0.94, color=COLOURS[name], label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("validation bits per byte")
    axes.set_ylim(0, 1.22 * max(max(b.values()) for b in bits.values()))
    axes.set_title("Lower is better: a model of English, and with adapters of equal size", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=len(order), loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_gates(gates: dict[str, Tensor], domains: list[str], path: Path) -> None:
    """Heat maps of the mean gates in the most specialised layers, next to bars of how specialised every layer is."""
    best = most_specialised(gates)[:SHOWN]
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=[2.1, 1])
    left, right = panels
    top = max(gates[name].max().item() for name in best)
    grid = left.subplots(3, 2, sharex=True, sharey=True)
    images = []
    for axes, name in zip(grid.flat, best, strict=False):
        images.append(axes.imshow(gates[name], cmap="viridis", vmin=0.0, vmax=top, aspect="auto"))
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xticks(range(gates[name].shape[1]))
        axes.set_yticks(range(len(domains)), domains)
        for row, shares in enumerate(gates[name].tolist()):
            for column, share in enumerate(shares):
                ink = "black" if share > 0.6 * top else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    left.suptitle("Mean gate in per cent, the six most specialised layers", fontsize=11)
    left.colorbar(images[0], ax=grid, shrink=0.6, format=lambda share, _: f"{100 * share:.0f} %")

    axes = right.subplots()
    names = list(gates)
    axes.barh(names, [domain_bits(gates[name]) for name in names], color="#4477aa")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("bits")
    axes.spines[["top", "right"]].set_visible(False)
    right.suptitle("What the choice of expert tells about the domain", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)
