# SPDX-License-Identifier: Apache-2.0
"""`python -m lmoe_kernels.info` prints what a bug report needs: versions, GPUs, the CUDA extension, the selected backend."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from lmoe_kernels import __version__
from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.dispatch import AUTO, explain_choice
from lmoe_kernels.options import Problem, Sizes


def report() -> str:
    """The text that the command prints."""
    lines = [
        f"lmoe_kernels {__version__}, torch {torch.__version__}, triton {_version('triton')}",
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"CUDA of torch: {torch.version.cuda or torch.version.hip or 'none'}",
        f"GPUs: {', '.join(_gpus()) or 'none'}",
        f"CUDA extension: {_extension()}",
        "",
    ]
    device = torch.device("cuda", torch.cuda.current_device()) if _gpus() else torch.device("cpu")
    for dtype, tokens in ((torch.bfloat16, 1), (torch.bfloat16, 8192), (torch.float64, 8192)):
        sizes = Sizes(tokens, I=4096, O=4096, E=8, R=16, experts_of_a=8)
        lines.append(explain_choice("lmoe", Problem(sizes, dtype, device), AUTO))
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor})")
    return names


def _extension() -> str:
    try:
        extension.library()
    except ImportError as error:
        return str(error).removeprefix("lmoe: ")
    info = extension.build_info()
    return f"nvcc {info['nvcc']} for {info['archs']}" if "nvcc" in info else "loaded; setup.py left no record of the build"


if __name__ == "__main__":
    print(report())
