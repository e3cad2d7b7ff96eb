"""Docstrings as the site shows them: what stands under Semantics and Example is code."""

import re
from typing import Any

import griffe

_CODE = re.compile(r"^(Semantics|Example):\n((?:(?: {4}.*)?(?:\n|$))+)", re.MULTILINE)


class CodeSections(griffe.Extension):
    """Fence the sections whose lines are Python, so that they keep their lines."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _CODE.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match[str]) -> str:
    body = match[2].rstrip()
    return f"{match[1]}:\n    ```python\n{body}\n    ```\n\n"
