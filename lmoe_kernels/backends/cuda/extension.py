# SPDX-License-Identifier: Apache-2.0
"""The compiled extension `lmoe_kernels._cuda`: loaded when it is first used, or the reason why it cannot be loaded."""

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype in csrc/params.h
BUILD_INFO = Path(__file__).parents[2] / "_build_info.json"


def build_info() -> dict[str, str]:
    """What setup.py recorded: `cuda` says "built" or why the extension was left out; nvcc and architectures where built."""
    if not BUILD_INFO.exists():
        return {"cuda": "setup.py has not run here"}
    return json.loads(BUILD_INFO.read_text())


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("lmoe_kernels._cuda"), None
    except ImportError as error:
        built = build_info()["cuda"]
        return None, f"the extension was not built: {built}" if built != "built" else f"the extension does not load: {error}"


def library() -> ModuleType:
    """The extension.

    Raises:
        ImportError: it was not built or does not load.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(f"lmoe: {reason}")
    return module


def why_not_loaded() -> str | None:
    """Why there is no extension, None where there is one."""
    return _load()[1]


def queue(tensor: torch.Tensor) -> tuple[int, int]:
    """Where to launch: the index of the tensor's device, and the current stream on it."""
    index = tensor.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


class Device(NamedTuple):
    """What a device offers the kernels; memory in bytes. The fields are those of `Properties` in csrc/launchers.h."""

    processors: int
    shared_memory_a_block: int  # at most; what CUDA allows every kernel if the driver refuses more
    cooperative: bool  # all blocks of a launch can wait for one another


@cache
def device_of(index: int) -> Device:
    """The properties of a device.

    Raises:
        RuntimeError: the driver is too old, or the extension was not built for the device's architecture.
    """
    return Device(*library().properties(index))
