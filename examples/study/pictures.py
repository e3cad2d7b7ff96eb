"""The pictures of the study: a dot for each seed, a line for the mean."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

from study import adding, composing, joint
from study.tables import OLD, Results, way_to_oracle

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LORA, MIXTURE, REFERENCE = "#4477aa", "#cc6677", "#777777"


def draw(results: Results, folder: Path) -> None:
    """Write joint.png, composing.png and adding.png, each if it has results."""
    lora = results.bits("one LoRA")
    differences = {
        method.name: [bits[seed] - lora[seed] for seed in bits.keys() & lora.keys()]
        for method in joint.methods()
        if method.name != "one LoRA" and (bits := results.bits(method.name))
    }
    if differences:
        _dots(differences, folder / "joint.png", "Bits per byte more than one LoRA (below 0: better), seed by seed", 0.0)
    ways = {name: list(way.values()) for name, way in way_to_oracle(results).items() if way and name != "frozen base"}
    if ways:
        _dots(
            ways, folder / "composing.png", "Way from the average of the LoRAs (0) to the oracle (1), seed by seed", 0.0, 1.0
        )
    _adding(results, folder / "adding.png")


def _dots(rows: dict[str, list[float]], path: Path, title: str, *lines: float) -> None:
    """One line of dots for each row."""
    figure, axes = plt.subplots(figsize=(8.5, 0.9 + 0.33 * len(rows)), layout="constrained")
    for line in lines:
        axes.axvline(line, color="#bbbbbb", linewidth=1, zorder=0)
    for place, (name, values) in enumerate(rows.items()):
        colour = LORA if "one LoRA" in name else REFERENCE if name in composing.REFERENCES else MIXTURE
        axes.scatter(values, [place] * len(values), s=24, color=colour, alpha=0.75, linewidth=0)
        axes.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10, x=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _adding(results: Results, path: Path) -> None:
    """Where each model of part (c) is: its loss on the old domains over that on the new one; arrows from before to after."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    start: Any = None
    for method in adding.methods():
        old, new = results.bits(method.name, OLD), results.bits(method.name, composing.DOMAINS[3:])
        if not old:
            continue
        colour = LORA if method.name in adding.OF_LORA else MIXTURE
        here = (mean(new.values()), mean(old.values()))
        axes.scatter([new[seed] for seed in old], list(old.values()), s=14, color=colour, alpha=0.5, linewidth=0)
        axes.scatter(*here, s=60, color=colour)
        axes.annotate(method.name, here, xytext=(7, 6), textcoords="offset points", fontsize=8, color=colour)
        if method.name in adding.BEFORE:
            start = here
        elif start is not None:
            arrow = {"arrowstyle": "->", "color": colour, "alpha": 0.6, "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", here, start, arrowprops=arrow)
    if start is not None:
        axes.margins(x=0.28, y=0.12)
        axes.set_xlabel("bits per byte on bytecode, the domain that comes later")
        axes.set_ylabel("bits per byte on the first three domains")
        axes.set_title("Left: the new domain is learned. Down: the first three are kept.", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=140)
    plt.close(figure)
