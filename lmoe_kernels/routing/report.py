# SPDX-License-Identifier: Apache-2.0
"""The report on routing statistics: pictures, tables and coloured text on one HTML page, or in a notebook."""

import os
from pathlib import Path
from typing import Any

from lmoe_kernels.checks import fail
from lmoe_kernels.routing import page, pictures
from lmoe_kernels.routing.stats import RoutingStats
from lmoe_kernels.routing.sums import RoutingSums, load_stats

TITLE = "What the gates do"


class Report:
    """A report that notebooks show.

    Attributes:
        html: the report as an HTML element with its style, which loads nothing from elsewhere.
    """

    def __init__(self, html: str) -> None:
        self.html = html

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"<a report of {len(self.html)} bytes of HTML; a notebook shows it, write_report writes it to a file>"


def show(stats: RoutingStats | RoutingSums, title: str = TITLE) -> Report:
    """Draw the statistics for a notebook, which shows the returned object.

    Args:
        stats: the statistics, still in a `RoutingStats` or read by `load_stats`.
        title: the heading.

    Returns:
        an object with `_repr_html_`.

    Raises:
        ValueError: the model has not run.
        ImportError: matplotlib is not installed.

    Example:
        show(stats)  # the last line of a cell
    """
    return Report(_report("show", _sums("show", stats), title))


def write_report(
    stats: RoutingStats | RoutingSums | str | os.PathLike[str], path: str | os.PathLike[str], title: str = TITLE
) -> None:
    """Write the report as one HTML file, which loads nothing from elsewhere.

    Args:
        stats: the statistics, or the directory that they were saved to.
        path: the file, which is replaced if it exists.
        title: the heading.

    Raises:
        FileNotFoundError: the directory has no statistics.
        ValueError: the model has not run, or the file with the statistics is damaged.
        ImportError: matplotlib is not installed, or for a directory safetensors.
    """
    sums = load_stats(stats) if isinstance(stats, str | os.PathLike) else _sums("write_report", stats)
    html = page.page(title, _report("write_report", sums, title))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(html, encoding="utf-8")
    partial.replace(target)  # a reader never sees a part of the file


def _sums(op: str, stats: Any) -> RoutingSums:
    if isinstance(stats, RoutingStats):
        return stats.sums()
    if not isinstance(stats, RoutingSums):
        fail(op, "stats", "be a RoutingStats or what load_stats returns", type(stats).__name__, TypeError)
    return stats


def _report(op: str, sums: RoutingSums, title: str) -> str:
    summary = sums.summary()
    blocks = [f"<p>{_counted(summary, sums)}</p>\n"]
    add = blocks.append
    add(
        page.section(
            "Layers and experts",
            "Mean gate in per cent: how much of each expert a layer takes, over all tokens.",
            page.figure(pictures.layers_and_experts(op, summary)) + _numbers(summary),
        )
    )
    if any(of_layer.get("label_bits") is not None for of_layer in summary.values()):
        add(
            page.section(
                "Labels and experts",
                f"Mean gate in per cent, in the layers (at most {pictures.SHOWN}) whose gates differ most between labels.",
                page.figure(pictures.labels_and_experts(op, summary)) + _numbers_by_label(summary),
            )
        )
        add(
            page.section(
                "What the choice of an expert tells about the label",
                "Mutual information in bits, all labels equally likely; 0 if the gates are the same for all labels.",
                page.figure(pictures.bits_of_layers(op, summary)),
            )
        )
    add(
        page.section(
            "Experts in use",
            "Experts per token: 2 ** mean entropy of a token's gates. Effective experts: 2 ** entropy of the mean gate.",
            page.figure(pictures.experts_in_use(op, summary)),
        )
    )
    if sum(bool(of_step) for _, of_step in sums.snapshots) > 1:
        add(page.section("Drift", "The mean gates between snapshots.", page.figure(pictures.drift(op, sums))))
    for number, text in enumerate(sums.texts):
        add(page.section(text.title or "Text by expert", "", page.coloured_text(text, number)))
    return page.part(title, blocks)


def _counted(summary: dict[str, dict[str, Any]], sums: RoutingSums) -> str:
    tokens = max(of_layer["tokens"] for of_layer in summary.values())
    experts = sorted({len(of_layer["experts"]) for of_layer in summary.values()})
    shown = " or ".join(map(str, experts))
    return f"{len(summary)} layers of {shown} experts, {tokens:,} tokens, {len(sums.labels)} labels."


def _numbers(summary: dict[str, dict[str, Any]]) -> str:
    header = ["layer", "tokens", "entropy, bits", "experts per token", "effective experts", "largest load", "mean gates, %"]
    rows = [
        [
            name,
            of_layer["tokens"],
            *(f"{of_layer[key]:.2f}" for key in ("entropy_bits", "experts_per_token", "effective_experts")),
            f"{100 * max(of_layer['load']):.0f} %",
            _per_cent(of_layer["mean_gate"]),
        ]
        for name, of_layer in summary.items()
    ]
    return page.table(header, rows)


def _numbers_by_label(summary: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, label, of_label["tokens"], f"{of_label['effective_experts']:.2f}", _per_cent(of_label["mean_gate"])]
        for name, of_layer in summary.items()
        for label, of_label in of_layer["labels"].items()
    ]
    return page.table(["layer", "label", "tokens", "effective experts", "mean gates, %"], rows)


def _per_cent(shares: list[float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares)
