# SPDX-License-Identifier: Apache-2.0
"""Why the `cuda` backend cannot take a call, or does not by default."""

from functools import cache

import torch

from lmoe_kernels.backends.cuda import configs, extension
from lmoe_kernels.options import Problem


def why_not(problem: Problem) -> str | None:
    """The extension must have been built, for the GPU that holds the tensors."""
    if problem.dtype not in extension.DTYPES:
        return f"it computes in fp32, bf16 and fp16, not in {problem.dtype}"
    return extension.why_not_loaded() or _why_not_on(problem.device)


def why_not_by_default(problem: Problem) -> str | None:
    """Expected, not measured: few launches that cost the host little win while latency is the limit.

    By `python -m benchmarks.model` its kernels are faster than the `torch` backend's at 512 tokens up to E R = 1024, and
    level at 2048 (H100, H200, 4096 x 4096, bf16). For more tokens `triton` has Hopper's instructions, not used here.
    """
    if problem.on_cpu:  # before `why_not` looks for the extension: on a CPU the choice itself takes time
        return "on a CPU only if selected by name"
    tokens = problem.sizes.T
    if tokens > configs.FEW_TOKENS:
        return f"it is expected to win at T <= {configs.FEW_TOKENS} alone"
    return _why_not_in_one_launch(problem.device) if tokens <= configs.DECODE_TOKENS else None


@cache
def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs, the tensors are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    try:
        allowed = extension.device_of(device.index).shared_memory_a_block
    except RuntimeError as error:
        return f"the extension cannot run there: {error}"
    if allowed < configs.STAGES_SMEM:
        return f"it needs {configs.STAGES_SMEM} bytes of shared memory a block, the device or its driver allows {allowed}"
    return None


def _why_not_in_one_launch(device: torch.device) -> str | None:
    """Where `why_not` has a reason, that one is enough."""
    if device.type != "cuda":
        return None
    try:
        cooperative = extension.device_of(device.index).cooperative
    except (ImportError, RuntimeError):
        return None
    return None if cooperative else "few tokens take several launches there: the device has no cooperative launch"
