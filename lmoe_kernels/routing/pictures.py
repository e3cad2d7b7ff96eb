# SPDX-License-Identifier: Apache-2.0
"""Pictures of routing statistics as SVG for an HTML page, drawn with matplotlib.

Text and axes have the page's own colour, so that the pictures can be read on light and on dark pages. The colours of values
are those of "cividis", which looks the same to people who do not tell red from green.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from lmoe_kernels.routing.sums import RoutingSums

# Okabe and Ito's colours without black, which is not visible on dark pages; seven experts later they start again.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
HATCHES = ("", "///", "...", "xxx")  # tell experts of the same colour apart
SHOWN = 6  # layers whose gates by label are drawn
_INK = "#010203"  # stands for the page's colour of text until the picture is in the page
_LINES = ("-", "--", ":", "-.")
_MARKERS = "os^DvPX"  # one for each colour, which tells lines apart without it


class Canvas:
    """One figure of matplotlib, from the first line to the SVG."""

    def __init__(self, op: str, width: float, height: float) -> None:
        try:
            import matplotlib  # optional, and slow to import
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"{op}: matplotlib must be installed: pip install matplotlib") from error
        self._matplotlib = matplotlib
        with self._style("figure"):
            self.figure: Any = Figure(figsize=(width, height), layout="constrained")

    @contextmanager
    def _style(self, name: str) -> Iterator[None]:
        ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color")
        style: dict[Any, Any] = {
            **dict.fromkeys(ink, _INK),
            "svg.fonttype": "none",  # text stays text: it can be read aloud, and has the page's font
            "svg.hashsalt": name,  # the same picture has the same ids, and two pictures of a page have different ones
            "font.family": "sans-serif",
            "font.size": 9,
            "hatch.linewidth": 0.6,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
        }
        with self._matplotlib.rc_context(style):
            yield

    def draw(self, name: str, description: str, draw: Any) -> str:
        """Let a function draw on the figure, and return that as an SVG element with a description for screen readers."""
        text = io.StringIO()
        with self._style(name):
            draw(self.figure)
            none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(text, format="svg", metadata=none, transparent=True)
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
        label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the segments at the start that all have in common."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1 < len(parts):
        common += 1
    return [".".join(part[common:]) for part in parts]


def layers_and_experts(op: str, summary: dict[str, dict[str, Any]], value: str = "mean_gate") -> str:
    """A heat map: a row for each layer, a column for each expert."""
    rows = [of_layer[value] for of_layer in summary.values()]
    width = max(map(len, rows))
    padded = [row + [float("nan")] * (width - len(row)) for row in rows]
    canvas = Canvas(op, 7.6, 1.1 + 0.19 * len(rows))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _heat(figure, axes, padded, short_names(list(summary)), _columns(summary, width))

    return canvas.draw(value, f"heat map of {value.replace('_', ' ')} by layer and expert", draw)


def labels_and_experts(op: str, summary: dict[str, dict[str, Any]]) -> str:
    """Heat maps, one for each of the layers whose gates differ most between the labels: rows are labels, columns experts."""
    layers = [name for name in summary if summary[name].get("label_bits") is not None]
    best = sorted(layers, key=lambda name: -summary[name]["label_bits"])[:SHOWN]
    titles = dict(zip(summary, short_names(list(summary)), strict=True))
    labels = max((list(summary[name]["labels"]) for name in best), key=len)
    top = max(gate for name in best for label in summary[name]["labels"].values() for gate in label["mean_gate"])
    lines = (len(best) + 1) // 2
    canvas = Canvas(op, 7.6, lines * (0.75 + 0.24 * len(labels)))

    def draw(figure: Any) -> None:
        grid = figure.subplots(lines, 2, squeeze=False)
        for axes in grid.flat[len(best) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, best, strict=False):
            of_layer = summary[name]
            rows = [of_label["mean_gate"] for of_label in of_layer["labels"].values()]
            _heat(figure, axes, rows, list(of_layer["labels"]), of_layer["experts"], top, bar=False)
            axes.set_title(f"{titles[name]} ({of_layer['label_bits']:.3f} bits)", fontsize=8, loc="left")

    return canvas.draw("labels", "heat maps of the mean gate by label and expert", draw)


def experts_in_use(op: str, summary: dict[str, dict[str, Any]]) -> str:
    """Bars for each layer: how many experts a token mixes, how many are in use over all tokens, and their load."""
    names, layers = short_names(list(summary)), list(summary.values())
    canvas = Canvas(op, 7.6, 1.3 + 0.26 * len(names))

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        places = range(len(names))
        for shift, key, colour in ((-0.2, "experts_per_token", COLOURS[1]), (0.2, "effective_experts", COLOURS[0])):
            bars = [p + shift for p in places]
            left.barh(bars, [layer[key] for layer in layers], 0.36, color=colour, label=key.replace("_", " "))
        left.set_yticks(places, names, fontsize=7)
        left.set_ylim(len(names) - 0.4, -0.6)
        left.set_title("experts in use", fontsize=9, loc="left")
        left.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06 - 0.5 / len(names)), ncols=2)
        for expert in range(max(len(layer["load"]) for layer in layers)):
            loads = [layer["load"][expert] if expert < len(layer["load"]) else 0.0 for layer in layers]
            before = [sum(layer["load"][:expert]) for layer in layers]
            right.barh(
                list(places), loads, 0.76, left=before, color=_colour(expert), hatch=_of_round(HATCHES, expert), linewidth=0
            )
            for place, load, start in zip(places, loads, before, strict=True):
                if load > 0.08 * sum(layers[place]["load"]):
                    style = {"ha": "center", "va": "center", "fontsize": 6, "color": _ink_on(expert)}
                    right.text(start + load / 2, place, layers[place]["experts"][expert], **style)
        right.set_title("load: share of tokens that chose the expert", fontsize=9, loc="left")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)

    return canvas.draw("use", "bars of the experts in use and of their load by layer", draw)


def bits_of_layers(op: str, summary: dict[str, dict[str, Any]]) -> str:
    """Bars of what the choice of an expert tells about the label in each layer."""
    bits = {name: of_layer["label_bits"] for name, of_layer in summary.items() if of_layer.get("label_bits") is not None}
    canvas = Canvas(op, 7.6, 0.9 + 0.16 * len(bits))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(short_names(list(bits)), list(bits.values()), color=COLOURS[4])
        axes.set_ylim(len(bits) - 0.4, -0.6)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("bits")
        axes.spines[["top", "right"]].set_visible(False)

    return canvas.draw("bits", "bars of the mutual information of label and expert by layer", draw)


def drift(op: str, sums: RoutingSums) -> str:
    """Lines over the steps: the mean gate of each expert over the layers, and how far the mean gates moved."""
    steps = [of_step for of_step in sums.drift() if of_step["mean_gate"]]
    canvas = Canvas(op, 7.6, 2.9)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        numbers = [of_step["step"] for of_step in steps]
        width = max(len(gates) for of_step in steps for gates in of_step["mean_gate"].values())
        for expert in range(width):
            means = []
            for of_step in steps:
                gates = [gates[expert] for gates in of_step["mean_gate"].values() if expert < len(gates)]
                means.append(100 * sum(gates) / len(gates) if gates else float("nan"))
            style = {"color": _colour(expert), "linestyle": _of_round(_LINES, expert), "markersize": 4}
            left.plot(numbers, means, label=str(expert), marker=_MARKERS[expert % len(_MARKERS)], **style)
        left.set_title("mean gate of each expert over all layers, %", fontsize=9, loc="left")
        left.set_xlabel("step")
        left.legend(frameon=False, fontsize=7, title="expert", title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        moved = [_moved(a["mean_gate"], b["mean_gate"]) for a, b in pairwise(steps)]
        right.plot(numbers[1:], [100 * share for share in moved], color=COLOURS[5], marker="o", markersize=3)
        right.set_ylim(bottom=0)
        right.set_title("change since the snapshot before, %", fontsize=9, loc="left")
        right.set_xlabel("step")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.get_major_locator().set_params(integer=True)

    return canvas.draw("drift", "lines of the mean gates and of their change over the steps", draw)


def _moved(before: dict[str, list[float]], after: dict[str, list[float]]) -> float:
    """Half the sum of the absolute changes of the mean gates, averaged over the layers."""
    both = [name for name in after if name in before]
    changes = [sum(abs(a - b) for a, b in zip(before[name], after[name], strict=True)) / 2 for name in both]
    return sum(changes) / len(changes) if changes else float("nan")


def _heat(
    figure: Any,
    axes: Any,
    rows: list[list[float]],
    row_names: Sequence[str],
    columns: Sequence[str],
    top: float | None = None,
    bar: bool = True,
) -> None:
    """Draw a heat map with its numbers in per cent, if they fit."""
    top = max(value for row in rows for value in row if value == value) if top is None else top
    mesh = axes.pcolormesh(rows, cmap="cividis", vmin=0.0, vmax=top)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], row_names, fontsize=7)
    axes.set_xticks(
        [i + 0.5 for i in range(len(columns))], columns, fontsize=7, rotation=0 if max(map(len, columns)) < 5 else 30
    )
    axes.tick_params(length=0)
    if len(columns) <= 16 and len(rows) <= 64:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value == value:  # not NaN, which fills the rows of layers with fewer experts
                    ink = "black" if value > 0.55 * top else "white"
                    axes.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=7)
    if bar:
        axes.set_xlabel("expert")
        figure.colorbar(mesh, ax=axes, format=lambda share, _: f"{100 * share:.0f} %")


def _columns(summary: dict[str, dict[str, Any]], width: int) -> list[str]:
    """The experts' names if they are the same in all layers, else their numbers."""
    names = {tuple(of_layer["experts"]) for of_layer in summary.values()}
    return list(names.pop()) if len(names) == 1 else [str(i) for i in range(width)]


def _colour(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]


def _ink_on(expert: int) -> str:
    """The colour of text on the colour of an expert."""
    return "white" if _colour(expert) == "#0072b2" else "black"


def _of_round(styles: Sequence[str], expert: int) -> str:
    """The style that tells this expert apart from the others of its colour."""
    return styles[expert // len(COLOURS) % len(styles)]
