# SPDX-License-Identifier: Apache-2.0
"""Parts of the HTML report: the page around them, coloured text, and tables. They load nothing from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lmoe_kernels.routing.pictures import COLOURS
from lmoe_kernels.routing.text import TextRouting

_UNDERLINES = ("solid", "dotted", "dashed", "double")  # tell experts of the same colour apart
_STYLE = """
.routing { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --rule: #d1d9e0; --strength: .62;
  color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto;
  padding: 1rem 1.5rem 3rem; }
@media (prefers-color-scheme: dark) {
  .routing { --ink: #e6e9ee; --paper: #14171c; --soft: #a0a8b3; --rule: #363d47; --strength: .5; } }
.routing h1 { font-size: 1.5rem; } .routing h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
.routing p { margin: .3rem 0; } .routing .soft { color: var(--soft); }
.routing svg { width: 100%; height: auto; } .routing figure { margin: .5rem 0; }
.routing table { border-collapse: collapse; font-size: .85rem; } .routing .wide { overflow-x: auto; }
.routing th, .routing td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid var(--rule); }
.routing th:first-child, .routing td:first-child { text-align: left; }
.routing .text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; tab-size: 4;
  border: 1px solid var(--rule); border-radius: 6px; padding: .6rem .8rem; margin: .5rem 0; }
.routing .t { background: rgb(var(--c) / calc(var(--g) * var(--strength)));
  text-decoration: var(--u) underline rgb(var(--c)); text-underline-offset: 3px; text-decoration-thickness: 2px; }
.routing .legend { display: flex; flex-wrap: wrap; gap: .3rem .9rem; list-style: none; padding: 0; margin: .4rem 0; }
.routing .legend .t { padding: 0 .4rem; }
.routing sub { display: none; font-size: .65em; color: var(--soft); }
.routing .numbers:checked ~ .text sub { display: inline; }
"""
_GROUND = """
:root { color-scheme: light dark; } body { margin: 0; }
@media (prefers-color-scheme: dark) { body { background: #14171c; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML page around the parts of a report."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{_GROUND}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


def part(title: str, blocks: Iterable[str]) -> str:
    """The report as one element with its style, for a page or for the cell of a notebook."""
    return f'<style>{_STYLE}</style>\n<main class="routing"><h1>{escape(title)}</h1>\n{"".join(blocks)}</main>'


def section(title: str, explanation: str, content: str) -> str:
    """A heading, a sentence on what is shown, and the content."""
    return f'<section><h2>{escape(title)}</h2><p class="soft">{escape(explanation)}</p>\n{content}</section>\n'


def figure(svg: str) -> str:
    """A picture."""
    return f"<figure>{svg}</figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in a fold, for those who want the numbers or do not see the pictures."""
    lines = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    return (
        f'<details><summary>Numbers</summary><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></details>"
    )


def coloured_text(text: TextRouting, number: int) -> str:
    """A text in which the colour of each token shows its strongest expert, with a legend and the gate as its opacity.

    Colour is not the only sign: the tooltip has the name and the gate, and a switch writes the number of the expert wherever
    it changes.
    """
    low, high = min(text.gates), max(text.gates)
    spans, before = [], None
    for token, expert, gate in zip(text.tokens, text.chosen, text.gates, strict=True):
        strength = 0.2 + 0.8 * (gate - low) / (high - low) if high > low else 1.0
        tip = escape(f"expert {text.experts[expert]}, gate {gate:.2f}")
        sub = f"<sub>{expert}</sub>" if expert != before else ""
        style = f"--g:{strength:.2f};{_colours(expert)}"
        spans.append(f'{sub}<span class="t" style="{style}" title="{tip}">{escape(_shown(token))}</span>')
        before = expert
    used = sorted(set(text.chosen))
    legend = "".join(
        f'<li><span class="t" style="--g:1;{_colours(expert)}">{expert}</span> {escape(_name(text, expert))}'
        f'<span class="soft">{100 * text.chosen.count(expert) / len(text.chosen):.0f} % of the tokens</span></li>'
        for expert in used
    )
    switch = f'<input type="checkbox" class="numbers" id="numbers-{number}">'
    switch += f'<label for="numbers-{number}"> numbers of the experts</label>'
    scale = f"The strongest expert of each token in {text.layer}; its gate is from {low:.2f} (pale) to {high:.2f} (strong)."
    return (
        f'<p class="soft">{escape(scale)}</p><ul class="legend">{legend}</ul>{switch}\n'
        f'<div class="text">{"".join(spans)}</div>\n'
    )


def _name(text: TextRouting, expert: int) -> str:
    """The expert's name in the legend, unless it is its number."""
    return "" if text.experts[expert] == str(expert) else f"{text.experts[expert]} "


def _shown(token: str) -> str:
    """The token's text, with signs for what is not visible."""
    visible = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in token)
    return visible.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")


def _colours(expert: int) -> str:
    colour = COLOURS[expert % len(COLOURS)]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"--c:{red} {green} {blue};--u:{_UNDERLINES[expert // len(COLOURS) % len(_UNDERLINES)]}"
