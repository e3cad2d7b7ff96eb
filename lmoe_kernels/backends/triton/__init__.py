"""Fused Triton kernels: NVIDIA and AMD GPUs, and, in tests, the CPU through Triton's interpreter."""

from lmoe_kernels.backends.triton.backward import backward
from lmoe_kernels.backends.triton.forward import forward

__all__ = ["backward", "forward"]
