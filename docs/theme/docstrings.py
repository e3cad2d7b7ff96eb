"""The API as the site shows it: what stands under Semantics and Example is code; **unknown only serves an error."""

import re
from typing import Any

import griffe

_CODE = re.compile(r"^(Semantics|Example):\n((?:(?: {4}.*)?(?:\n|$))+)", re.MULTILINE)


class ReadableApi(griffe.Extension):
    """Fence the sections whose lines are Python, so that they keep their lines; drop the parameter of unknown keywords."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change one object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _CODE.sub(_fenced, obj.docstring.value)
        if isinstance(obj, griffe.Function) and "unknown" in obj.parameters:
            del obj.parameters["unknown"]


def _fenced(match: re.Match[str]) -> str:
    body = match[2].rstrip()
    return f"{match[1]}:\n    ```python\n{body}\n    ```\n\n"
