"""The study in one picture: over the scaling, over the scaling as a multiple of E, and over the gate at the start."""

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.defaults.plan import METHODS, MIXINGS, USUAL, Plan, default_scaling, point
from benchmarks.defaults.report import Tables
from benchmarks.defaults.results import Results

COLOURS = {"LoRA": "#555555", "factors": "#0072B2", "outputs": "#D55E00"}  # Okabe and Ito's
LABELS = {"LoRA": "one LoRA", "factors": "factors", "outputs": "outputs"}
HEIGHT = 0.45  # bits per byte that are drawn above the best point; points above that are only counted
STYLES = {1e-3: ":", 3e-3: "-", 1e-2: "--"}


def draw(results: Results, plan: Plan, path: Path) -> None:
    """Write the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = Tables(results, plan)
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.4), layout="constrained")
        _over_scaling(left, tables)
        _over_experts(middle, tables)
        _over_gates(right, tables)
        figure.suptitle(
            f"Validation bits per byte after {results.settings.steps} steps, lower is better", x=0.01, ha="left", fontsize=11
        )
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _over_scaling(axes: Any, tables: Tables) -> None:
    plan, ticks, drawn = tables.plan, set(), []
    for method in METHODS:
        for rate, scalings in plan.grid[method].items():
            found = []
            for scaling in scalings:
                bits = [b for b in tables.reported(point(method, scaling, rate, s) for s in plan.seeds) if b is not None]
                if bits:
                    found.append((scaling, mean(bits)))
            ticks.update(scalings)
            drawn += [bits for _, bits in found]
            label = LABELS[method] if rate == USUAL else None
            axes.plot(*zip(*found, strict=True), STYLES[rate], color=COLOURS[method], marker="o", markersize=3, label=label)
            for place in found:
                if place[0] == default_scaling(method):
                    axes.plot(*place, "o", color=COLOURS[method], markersize=9, markerfacecolor="none")
    for rate, style in STYLES.items():
        axes.plot([], [], style, color="#999999", label=f"learning rate {rate:g}")
    top = min(drawn) + HEIGHT
    above = sum(bits > top for bits in drawn)
    cut = f"; {above} points lie above" if above else ""
    axes.set(xscale="log", xlabel=f"scaling (ring: the default{cut})", title="one LoRA and eight experts")
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.minorticks_off()
    if above:
        axes.set_ylim(min(drawn) - HEIGHT / 15, top)
    axes.legend(frameon=False, fontsize=8)


def _over_experts(axes: Any, tables: Tables) -> None:
    trials = list(tables.plan.other_sizes())
    for mixing in MIXINGS:
        for experts, mark in zip(tables.plan.experts, "sD^v", strict=False):
            own = [t for t in trials if (t.mixing, t.num_experts) == (mixing, experts)]
            found = [(t.scaling / experts, b) for t in own for b in tables.reported([t]) if b is not None]
            label = f"{mixing}, {experts} experts"
            axes.plot(*zip(*found, strict=True), marker=mark, markersize=4, color=COLOURS[mixing], label=label, alpha=0.8)
    axes.set(xscale="log", xlabel="scaling / number of experts", title=f"other numbers of experts, rate {USUAL:g}")
    axes.set_xticks(tables.plan.scalings_over_experts, [f"{k:g}" for k in tables.plan.scalings_over_experts])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)


def _over_gates(axes: Any, tables: Tables) -> None:
    plan, trials = tables.plan, list(tables.plan.gates())
    names = ["1/sqrt(I)" if std is None else f"{std:g}" for std in plan.gate_init_stds]
    for mixing in MIXINGS:
        for place, std in enumerate(plan.gate_init_stds):
            row = [t for t in trials if (t.mixing, t.gate_init_std) == (mixing, std) and t in tables.known]
            alike = [a for t in row if (a := tables.known[t].likeness) is not None]
            label = mixing if place == 0 else None
            axes.plot([place] * len(alike), alike, "o", color=COLOURS[mixing], label=label, alpha=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="gate_init_std", title="mean cosine between two experts' B")
    axes.axhline(0, color="#CCCCCC", linewidth=0.8, zorder=0)
    axes.legend(frameon=False)
