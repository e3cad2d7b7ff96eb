"""Hand-written CUDA kernels (csrc/) behind a torch-free extension: lowest launch cost, made for few tokens."""

from lmoe_kernels.backends.cuda.backward import backward
from lmoe_kernels.backends.cuda.forward import forward

__all__ = ["backward", "forward"]
