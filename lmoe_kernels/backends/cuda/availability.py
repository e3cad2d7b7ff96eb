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
    """It is taken where its forward is one launch, up to 16 tokens. That costs the host the least.

    With 16 tokens an eager forward of a layer takes 50 us, with `triton` 97. In a CUDA graph, where the host is idle, these
    are 32.1 and 25.3, and with experts in fp32 32.6 and 41.1. For more tokens `triton` is faster: with 512 it takes 39.4 us
    instead of 49.0, and with 8192 a delta and its backward take 176 instead of 305 (4096 x 4096, E=8, R=16, bf16; H200,
    torch 2.11, Triton 3.6, 2026-11-26).

    Stacked mixtures are not its own in a CUDA graph, where `triton` takes less time for any number of tokens: q, k and v of
    4096 features 7.9 and 9.6 us with 1 token, 8.8 and 20.8 with 16. Without a graph the host needs 75 and 37 us for a call.
    """
    if problem.on_cpu:  # before `why_not` looks for the extension: on a CPU the choice itself takes time
        return "on a CPU only if selected by name"
    if problem.sizes.T > configs.DECODE_TOKENS:
        return f"its forward is one launch at T <= {configs.DECODE_TOKENS} alone"
    if problem.stacked and problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph, in which 'triton' is faster, records the call"
    return _why_not_in_one_launch(problem.device)


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
