# SPDX-License-Identifier: Apache-2.0
"""The router logits of a gate as a function, for code that needs them before or without the experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_kernels import autograd, checks, ops
from lmoe_kernels.functional import autocast, flat
from lmoe_kernels.products import linear_wide


def router_logits(x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None = None) -> Tensor:
    """Compute the router logits of a gate, as `lmoe` does: the gate is rounded to x's dtype, the sums are not.

    Where each rank of tensor parallelism has some features of x and of the gate, add up the logits of all ranks before they
    are passed to `lmoe` as gate_logits, with the bias on one rank. A softmax of partial sums would be wrong.

    Semantics:
        logits = x @ gate_weight.T + gate_bias

    Args:
        x: (..., I) in fp32, bf16, fp16 or fp64. Autocast casts it.
        gate_weight: (E, I), x's dtype or fp32. For an x in fp32 it is not cast. A 16-bit x on a CPU is cast to fp32 for the
            product, so if an fp32 gate holds rounded values already, pass `x.float()`: no gate is cast then.
        gate_bias: (E), x's dtype or fp32.

    Returns:
        logits (..., E) in fp32 (fp64 for fp64), differentiable.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a type, a layout or a dtype is not supported.

    Example:
        logits = router_logits(x, gate_weight)
        y = lmoe(x, lora_a, lora_b, gate_logits=logits)

    Source: L-MoE, arXiv 2510.17898.
    """
    is_cast = ops.autocast_is_on()
    if is_cast:
        x = autocast(x)
    checks.check_gate("router_logits", x, gate_weight, gate_bias)
    if not is_cast:
        return _logits(x, gate_weight, gate_bias)
    with torch.autocast(x.device.type, enabled=False):
        return _logits(x, gate_weight, gate_bias)


def _logits(x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None) -> Tensor:
    if torch._C._are_functorch_transforms_active() or autograd.is_differentiated((x, gate_weight, gate_bias)):
        wide = torch.promote_types(x.dtype, torch.float32)  # ATen has no derivative of the product in `linear_wide`
        logits = F.linear(x.to(wide), _rounded(gate_weight, x.dtype).to(wide))
    else:
        logits = linear_wide(flat(x), gate_weight.to(x.dtype)).view(*x.shape[:-1], len(gate_weight))
    return logits if gate_bias is None else logits + gate_bias


def _rounded(gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate rounded to this dtype, in its own. The rounding is left out of the derivative, which `to` would round too.

    The difference and the sum are exact: a number and its rounded value differ by less than a factor of two, or one is 0.
    """
    if gate_weight.dtype.itemsize <= dtype.itemsize:
        return gate_weight
    fixed = gate_weight.detach()
    return gate_weight + (fixed.to(dtype).to(gate_weight.dtype) - fixed)
