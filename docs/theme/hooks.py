"""What `make docs` does to pages: files from outside of docs/ become pages too, and equations become MathML."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

RESULTS = "benchmarks/results"
EQUATION = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.DOTALL)


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
    """Equations as MathML, which browsers show without a script."""
    return EQUATION.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    block, text = match[1] == "div", unescape(match[2]).strip()
    math = convert(text[2:-2].strip(), display="block" if block else "inline")
    return f'<div class="equation">{math}</div>' if block else math
