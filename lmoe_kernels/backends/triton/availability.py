# SPDX-License-Identifier: Apache-2.0
"""Why the `triton` backend cannot take a call, or does not by default. Triton itself is not imported."""

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from lmoe_kernels.options import Problem

MOST_EXPERTS = 256  # one tile of gates holds all experts of its tokens


def why_not(problem: Problem) -> str | None:
    """On the CPU the kernels run in Triton's interpreter, where that is switched on."""
    if problem.sizes.E > MOST_EXPERTS:
        return f"its kernels take at most {MOST_EXPERTS} experts, not {problem.sizes.E}"
    if not _installed("triton"):
        return "Triton is not installed"
    if problem.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if problem.device.type != "cuda":
        return f"its kernels run on GPUs, not on {problem.device.type}"
    if problem.dtype == torch.float64:
        return "its kernels take fp32, bf16 and fp16 on a GPU, not fp64"
    if torch.version.hip is None and torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "its kernels need compute capability 8.0"
    return None


def why_not_by_default(problem: Problem) -> str | None:
    """The interpreter is for tests; on a GPU Triton needs a C compiler."""
    if problem.device.type == "cpu":
        return "on a CPU only if selected by name"
    return _why_no_launchers()


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _why_no_launchers() -> str | None:
    """Triton compiles its launchers in C; minimal container images often lack a C compiler or Python's headers."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler for its launchers: no gcc, no clang, no CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        return "Triton finds no Python.h for its launchers"
    return None
