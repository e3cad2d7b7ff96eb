"""Draw the pictures of the documentation, each for a light and for a dark page: `python -m docs.pictures.draw`.

They are about 460 pixels wide, so that their letters stay legible on a telephone. The same input gives the same bytes.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-2-cores" / "results.json"
WIDTH = 4.8  # inches; an SVG has 72 points to the inch, which a browser shows as 96 pixels


class Palette(NamedTuple):
    """The colours of one kind of page. Told apart with any colour vision."""

    ink: str
    faint: str
    ours: str
    others: str
    ours_fill: str
    fill: str
    kept: str


PALETTES = {
    "light": Palette("#1f2328", "#656d76", "#0969da", "#9aa4ae", "#ddf4ff", "#f3f4f6", "#bc4c00"),
    "dark": Palette("#e6edf3", "#9da7b3", "#4ea1ff", "#6e7781", "#12304f", "#22272e", "#ffa657"),
}


class Sizes(NamedTuple):
    """The letters of the documentation but T."""

    I: int  # noqa: E741 - the letter of the mathematics
    O: int  # noqa: E741
    E: int
    R: int


SIZES = Sizes(2048, 2048, 8, 16)


def numbers_moved(way: str, sizes: Sizes) -> tuple[int, int]:
    """Numbers a token that a layer's forward and backward read and write, each operation by itself, no cache between them.

    The weights are left out: all tokens share them. `tests/repo/test_docs.py` compares this with a count of the operations.
    """
    in_, out, experts, rank = sizes
    ranks = experts * rank
    table = {
        "frozen": (in_ + out, in_ + out),
        "peft": (2 * in_ + 7 * out + 2 * rank, 6 * in_ + 5 * out + 4 * rank),
        "literal": (
            3 * in_ + 7 * out + 2 * rank + 5 * experts + 2 * rank * (in_ + out),
            11 * in_ + 5 * out + 4 * rank + 12 * experts + rank * (4 * in_ + 6 * out),
        ),
        "loop": (
            2 * in_ + out + experts * (in_ + 8 * out + 2 * rank + 4),
            6 * in_ + out + experts * (5 * in_ + 10 * out + 4 * rank + 5 + 4 * experts),
        ),
        "eager": (3 * in_ + 7 * out + 2 * rank + 5 * experts + 6 * ranks,
                  11 * in_ + 5 * out + 4 * rank + 12 * experts + 14 * ranks),
        "torch": (3 * in_ + 3 * out + 2 * rank + 7 * experts + 4 * ranks,
                  7 * in_ + 3 * out + 6 * rank + 16 * experts + 10 * ranks),
    }  # fmt: skip
    return table[way]


LABELS = {
    "literal": "the definition",
    "loop": "loop over eight LoRAs",
    "eager": "factored, eager PyTorch",
    "torch": "lmoe_kernels, torch",
    "peft-all": "PEFT, eight active LoRAs",
    "peft": "PEFT, one LoRA",
    "frozen": "the frozen layer alone",
}


def draw_flow(palette: Palette) -> Figure:
    """What one layer computes, with the numbers a token that each tensor has."""
    figure, axes = _page(6.2)
    axes.set_xlim(0, 10)
    axes.set_ylim(-1.7, 11.5)
    ours, plain = {"edge": palette.ours, "fill": palette.ours_fill}, {"edge": palette.others, "fill": palette.fill}

    _box(axes, palette, 5, 10.9, 9.6, 0.9, "$x$", "I numbers a token", edge=palette.kept, fill=palette.fill, wide=True)
    _box(axes, palette, 3.5, 8.8, 3.0, 1.5, "shrink", "$u_e = A_e\\,x$", **ours)
    _box(axes, palette, 7.6, 8.8, 4.4, 1.5, "gate", "$g = \\mathrm{softmax}(G x + b)$", **ours)
    _box(axes, palette, 5.9, 6.2, 7.8, 1.5, "mix", "$h = \\sum_e g_e u_e$,     $v_e = g_e h$", **ours)
    _box(axes, palette, 5.9, 3.8, 7.8, 1.5, "expand", "$\\delta = s\\,\\sum_e B_e v_e$", **ours)
    _box(axes, palette, 5, 1.3, 9.6, 1.5, "frozen layer, last", "$y = W x + \\mathrm{bias} + \\delta$", **plain)

    _arrow(axes, palette, (1.0, 10.45), (1.0, 2.05))
    _arrow(axes, palette, (3.5, 10.45), (3.5, 9.55))
    _arrow(axes, palette, (7.6, 10.45), (7.6, 9.55))
    _arrow(axes, palette, (3.5, 8.05), (3.5, 6.95), "$u$:  E R numbers", palette.kept)
    _arrow(axes, palette, (7.6, 8.05), (7.6, 6.95), "logits:  E", palette.kept)
    _arrow(axes, palette, (5.9, 5.45), (5.9, 4.55), "$v$:  E R")
    _arrow(axes, palette, (5.9, 3.05), (5.9, 2.05), "$\\delta$:  O")
    _arrow(axes, palette, (5.0, 0.55), (5.0, -0.4), "$y$:  O")
    axes.text(0.2, -1.3, "Orange: kept for the backward.", color=palette.kept, fontsize=9.5, va="center")
    return figure


def draw_bytes(palette: Palette) -> Figure:
    """Bytes a token that each way reads and writes in fp32."""
    ways = ("literal", "loop", "eager", "torch", "peft", "frozen")
    bars = [(way, 4 * sum(numbers_moved(way, SIZES))) for way in ways]
    title = "Read and written by forward and backward,\nbytes a token, fp32, counted by operation"
    return _bars(palette, bars, title)


def draw_memory(palette: Palette) -> Figure:
    """Bytes a token that the graph keeps for the backward in bf16, as the benchmark measured them."""
    kept = {
        record["row"]: record["saved_bytes"]
        for record in json.loads(RESULTS.read_text(encoding="utf-8"))["records"]
        if record["status"] == "ok" and record["scope"] == "layer" and record["phase"] == "forward+backward"
        and record["shape"] == {"tokens": 1, "in_features": 2048, "out_features": 2048, "num_experts": 8, "rank": 16,
                                "dtype": "bfloat16"}
    }  # fmt: skip
    bars = [(way, kept[way]) for way in ("literal", "loop", "eager", "torch", "peft-all", "peft")]
    title = "Kept for the backward beyond $x$, bytes a token,\nbf16, measured; bars on a logarithmic scale"
    return _bars(palette, bars, title, length=lambda value: math.log10(value / 8))


PICTURES: dict[str, Callable[[Palette], Figure]] = {"flow": draw_flow, "bytes": draw_bytes, "memory": draw_memory}


def draw(folder: Path) -> list[Path]:
    """Write every picture twice, `<name>-light.svg` and `<name>-dark.svg`."""
    style: dict[Any, Any] = {"svg.hashsalt": "lmoe_kernels", "font.size": 10, "mathtext.fontset": "dejavusans"}
    drawn = []
    with matplotlib.rc_context(style):
        for name, picture in PICTURES.items():
            for page, palette in PALETTES.items():
                figure = picture(palette)
                drawn.append(folder / f"{name}-{page}.svg")
                figure.savefig(drawn[-1], transparent=True, metadata={"Date": None})
                plt.close(figure)
    return drawn


def _page(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the common width."""
    figure = plt.figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    return figure, axes


def _box(
    axes: Axes, palette: Palette, x: float, y: float, width: float, height: float, name: str, text: str, *, edge: str,
    fill: str, wide: bool = False,
) -> None:  # fmt: skip
    """A box about (x, y), with a name over a line of text, or before it in a wide one."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=fill,
        edgecolor=edge, linewidth=1.4,
    )  # fmt: skip
    axes.add_patch(shape)
    if wide:
        axes.text(x, y, f"{name}:  {text}", ha="center", va="center", color=palette.ink, fontsize=10)
        return
    axes.text(x, y + 0.3, name, ha="center", va="center", color=palette.ink, fontsize=10, weight="bold")
    axes.text(x, y - 0.33, text, ha="center", va="center", color=palette.ink, fontsize=9)


def _arrow(
    axes: Axes, palette: Palette, start: tuple[float, float], end: tuple[float, float], text: str = "", colour: str = ""
) -> None:
    """A downward arrow with a remark to its right."""
    line = {"arrowstyle": "-|>", "color": colour or palette.faint, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=line)
    middle = (start[1] + end[1]) / 2
    axes.text(start[0] + 0.18, middle, text, ha="left", va="center", color=colour or palette.faint, fontsize=9)


def _bars(palette: Palette, bars: list[tuple[str, int]], title: str, length: Callable[[int], float] = float) -> Figure:
    """Horizontal bars with a label over each and its figure to the right, ours in blue."""
    figure, axes = _page(0.75 + 0.52 * len(bars))
    longest = max(length(value) for _, value in bars)
    axes.set_xlim(0, 1.25 * longest)
    axes.set_ylim(len(bars) + 0.02, -1.05)
    axes.text(0, -0.55, title, ha="left", va="center", color=palette.ink, fontsize=10)
    for row, (way, value) in enumerate(bars):
        ours = way == "torch"
        colour = palette.ours if ours else palette.others
        axes.barh(row + 0.62, length(value), height=0.36, color=colour)
        weight = "bold" if ours else "normal"
        axes.text(0, row + 0.3, LABELS[way], ha="left", va="center", color=palette.ink, fontsize=9.5, weight=weight)
        end = length(value) + 0.015 * longest
        axes.text(end, row + 0.62, f"{value:,}", ha="left", va="center", color=palette.ink, fontsize=9.5, weight=weight)
    return figure


def main() -> None:
    """Draw into the documentation's folder, or into another one."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder for the pictures")
    for path in draw(parser.parse_args().out):
        print(path.name)


if __name__ == "__main__":
    main()
