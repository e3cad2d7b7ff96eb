# SPDX-License-Identifier: Apache-2.0
"""Reads safetensors and JSON files that may be damaged or of another kind: each error is one line that names the file."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from lmoe_kernels.checks import fail


def safetensors(op: str) -> ModuleType:
    """Import safetensors.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"{op}: safetensors must be installed: pip install safetensors") from error


def read_text(op: str, path: Path) -> str:
    """Read a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        fail(op, f"{path}", "be JSON", _first_line(error))


def parsed_json(op: str, path: Path, text: str) -> Any:
    """Parse the text of a JSON file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, an integer that is too long, or nesting that is too deep
        fail(op, f"{path}", "be JSON", _first_line(error))


def read_tensors(op: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file."""
    safe_open = safetensors(op).safe_open
    try:
        with safe_open(path, "pt") as file:
            # safe_open has keys() but cannot be iterated
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # not every release of safetensors exports its SafetensorError
        fail(op, f"{path}", "be a safetensors file", _first_line(error))


def shortened(value: object, show: Any = repr) -> str:
    """The text of a value for an error message, cut after 200 characters."""
    try:
        text = show(value)
    except (ValueError, RecursionError):  # an integer that is too long, or nesting that is too deep
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _first_line(error: Exception) -> str:
    return shortened(str(error).partition("\n")[0], str)
