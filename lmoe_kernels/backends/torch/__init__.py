"""The factored form on ATen's matrix products: runs anywhere, the portable default."""

from lmoe_kernels.backends.torch.backward import backward
from lmoe_kernels.backends.torch.forward import forward

__all__ = ["backward", "forward"]
