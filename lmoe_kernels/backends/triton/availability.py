# SPDX-License-Identifier: Apache-2.0
"""Why the `triton` backend cannot take a call, or does not by default. Triton itself is not imported."""

import os
import re
import shutil
import sysconfig
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from lmoe_kernels.options import Problem

MOST_EXPERTS = 256  # one tile of gates holds all experts of its tokens
# The tests run with 3.6 and 3.7. Later versions of Triton 3 are expected to compile the same kernels, a next major is not.
OLDEST, NEXT_MAJOR = (3, 6), (4, 0)


def why_not(problem: Problem) -> str | None:
    """On the CPU the kernels run in Triton's interpreter, where that is switched on."""
    if problem.sizes.E > MOST_EXPERTS:
        return f"its kernels take at most {MOST_EXPERTS} experts, not {problem.sizes.E}"
    if not _installed("triton"):
        return "Triton is not installed"
    if problem.on_cpu and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if problem.device.type != "cuda":
        return f"its kernels run on GPUs, not on {problem.device.type}"
    if problem.dtype == torch.float64:
        return "its kernels take fp32, bf16 and fp16 on a GPU, not fp64"
    return _why_not_chip(problem.device)


def why_not_by_default(problem: Problem) -> str | None:
    """The interpreter is for tests; on a GPU Triton needs a C compiler, and a version that is tested."""
    if problem.on_cpu:
        return "on a CPU only if selected by name"
    return _why_no_launchers() or _why_untested()


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _why_not_chip(device: torch.device) -> str | None:
    """The kernels need matrix instructions for bf16: NVIDIA's since Ampere, AMD's since MI100 and RDNA 3."""
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"its kernels need compute capability 8.0, not {major}.{minor}"
    arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    series, model = arch.removeprefix("gfx")[:-2], arch[-2:]
    has_them = model in ("08", "0a") or model >= "40" if series == "9" else int(series) >= 11
    return None if has_them else f"its kernels need matrix instructions for bf16, which {arch} does not have"


@cache
def _why_no_launchers() -> str | None:
    """Triton compiles its launchers in C; minimal container images often lack a C compiler or Python's headers."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler for its launchers: no gcc, no clang, no CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        return "Triton finds no Python.h for its launchers"
    return None


@cache
def _why_untested() -> str | None:
    version = _version_of_triton()
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if OLDEST <= numbers < NEXT_MAJOR or len(numbers) < 2:
        return None
    return f"its kernels are tested with Triton {'.'.join(map(str, OLDEST))} or later, below {NEXT_MAJOR[0]}, not {version}"


def _version_of_triton() -> str:
    """The installed version, under the names that PyTorch's own builds have too; empty if it has none of them."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""
