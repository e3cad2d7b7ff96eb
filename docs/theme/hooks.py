"""What `make docs` does to pages: files from outside of docs/ become pages too, and equations become drawings.

Equations are set by matplotlib, so that they need neither a script nor a mathematics font of the reader's machine.
"""

import re
from html import escape, unescape
from pathlib import Path
from typing import Any

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import text_to_path
from mkdocs.structure.files import File

RESULTS = "benchmarks/results"
EQUATION = re.compile(r'<div class="arithmatex">(.*?)</div>', re.DOTALL)
EM = 12.0  # units of the outlines to one em of the page
COMMANDS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}


def on_files(files: Any, config: Any) -> Any:
    """Add the changelog and the benchmarks' results, which stay where they are in the repository."""
    root = Path(config.config_file_path).parent
    results = [path for path in sorted((root / RESULTS).rglob("*")) if path.suffix in (".md", ".png", ".txt")]
    for path in [root / "CHANGELOG.md", *results]:
        target = path.relative_to(root).as_posix().replace("CHANGELOG.md", "changelog.md").replace(RESULTS, "results")
        files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to these files, which are right in the repository, be right on the site."""
    if page.file.src_uri == "changelog.md":
        return markdown.replace("](docs/", "](")
    return markdown.replace(f"](../{RESULTS}/", "](results/").replace("](../CHANGELOG.md", "](changelog.md")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Every equation as a drawing in the colour of the text, which scrolls where the page is narrow."""
    return EQUATION.sub(lambda match: f'<div class="equation">{drawn(unescape(match[1]))}</div>', html)


def drawn(equation: str) -> str:
    """An equation of TeX, between the marks of a block, as SVG; screen readers get its text."""
    tex = " ".join(equation.strip().removeprefix("\\[").removesuffix("\\]").split())
    font = FontProperties(size=text_to_path.FONT_SCALE, math_fontfamily="cm")
    width, height, descent = text_to_path.get_text_width_height_descent(f"${tex}$", font, ismath=True)
    vertices, codes = text_to_path.get_text_path(font, f"${tex}$", ismath=True)
    scale = EM / text_to_path.FONT_SCALE
    width, height, descent = width * scale, height * scale + 2, descent * scale + 1
    points = [(f"{x * scale:.2f} {height - descent - y * scale:.2f}") for x, y in vertices]
    outline = _outline(points, [int(code) for code in codes])
    return (
        f'<svg role="img" aria-label="{escape(tex, quote=True)}" viewBox="0 0 {width:.2f} {height:.2f}" '
        f'style="width:{1.1 * width / EM:.3f}em" fill="currentColor"><path d="{outline}"/></svg>'
    )


def _outline(points: list[str], codes: list[int]) -> str:
    """The path data of an outline: a command, with as many points as it takes."""
    parts, at = [], 0
    while at < len(points):
        code = codes[at]
        if code == Outline.CLOSEPOLY:
            parts.append("Z")
            at += 1
            continue
        count = Outline.NUM_VERTICES_FOR_CODE[code]
        parts.append(COMMANDS[code] + " ".join(points[at : at + count]))
        at += count
    return "".join(parts)
