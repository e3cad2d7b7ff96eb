"""The factored form in plain PyTorch, differentiated by autograd: tests and benchmarks compare the package with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_kernels import reference
from lmoe_kernels.options import Factors, Options


def factored(x: Tensor, factors: Factors, options: Options) -> tuple[Tensor, Tensor]:
    """The delta (T, O) and the router logits (T, E), all in x's dtype: logits and gates are rounded to it too."""
    lora_a, lora_b, gate_weight, gate_bias, gate_logits = (None if t is None else t.to(x.dtype) for t in factors)
    assert lora_a is not None
    assert lora_b is not None
    logits = gate_logits if gate_weight is None else F.linear(x, gate_weight, gate_bias)
    assert logits is not None
    gates = logits
    if options.softmax:
        gates = reference.gate_softmax(logits, options.top_k, options.renormalize).to(x.dtype)
    u = torch.einsum("ti,eri->ter", x, lora_a)
    if options.averages_factors:
        h = torch.einsum("te,ter->tr", gates, u.expand(-1, gates.shape[1], -1))
        v = torch.einsum("te,tr->ter", gates, h)
    else:
        v = gates[:, :, None] * u
    return options.scaling * torch.einsum("ter,ero->to", v, lora_b), logits
