# SPDX-License-Identifier: Apache-2.0
"""Why the `cuda` backend cannot take a call, or does not by default."""

from functools import cache

import torch

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.options import Problem


def why_not(problem: Problem) -> str | None:
    """The extension must have been built, for the GPU that holds the tensors."""
    if problem.dtype not in extension.DTYPES:
        return f"it computes in fp32, bf16 and fp16, not in {problem.dtype}"
    return extension.why_not_loaded() or _why_not_on(problem.device)


def why_not_by_default(problem: Problem) -> str | None:
    """Expected, not measured: one launch and the lowest launch cost win while latency is the limit."""
    if problem.on_cpu:  # before `why_not` looks for the extension: on a CPU the choice itself takes time
        return "on a CPU only if selected by name"
    return None if problem.sizes.T <= 64 else "it is expected to win at T <= 64 alone"


@cache
def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs, the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    try:
        extension.processors(device.index)
    except RuntimeError as error:
        return f"the extension cannot run there: {error}"
    return None
