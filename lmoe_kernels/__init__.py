"""L-MoE: a mixture of LoRA experts, gated per token, beside a frozen linear layer, as fused and differentiable kernels."""

from lmoe_kernels.dispatch import use_backend
from lmoe_kernels.functional import explain, lmoe, lmoe_linear
from lmoe_kernels.version import __version__

__all__ = ["__version__", "explain", "lmoe", "lmoe_linear", "use_backend"]
