# SPDX-License-Identifier: Apache-2.0
"""Backward of the `torch` backend: shrink with B, mix backward, expand with A, and the three weight gradients.

Nothing is differentiated automatically, and no gradient is computed that is not wanted.
"""

import torch
from torch import Tensor

from lmoe_kernels.backends.torch.forward import blend, expand, gate_softmax, matmul_wide, mix, of_kept, shrink, sums_of
from lmoe_kernels.casting import from_buffer
from lmoe_kernels.options import Factors, Gradients, Options, Saved, Wanted


def backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I)
    factors: Factors,
    saved: Saved,
    options: Options,
    *,
    wanted: Wanted,
) -> Gradients:
    """The gradients that are wanted; see `lmoe_kernels.reference.backward` for the contract."""
    lora_a, lora_b, gate_weight, gate_bias, _ = factors
    cast = from_buffer(factors, dy.dtype, saved.cast)
    logits, u = saved.router_logits(factors), saved.u
    softmax, dropped = gate_softmax(logits, dy.dtype, options)
    gates = of_kept(softmax, dropped)
    sums = sums_of(gates, dropped)
    h, v = mix(gates, u, options, sums)
    dlora_b = wgrad(v, dy, lora_b, options.scaling) if wanted.lora_b else None
    if not (wanted.x or wanted.lora_a or wanted.gate):
        return Gradients(None, None, dlora_b)

    du, dgates = mix_backward(gates, u, h, shrink(dy, cast.lora_b), options, sums)
    dlogits = torch.ops.aten._softmax_backward_data(of_kept(dgates, dropped), softmax, 1, softmax.dtype)
    if dlogits_in is not None:
        dlogits += dlogits_in

    dx = dlora_a = dgate_weight = dgate_bias = dgate_logits = None
    if wanted.x:
        dx = expand(du, cast.lora_a, None, 1.0)
        if cast.gate_weight is not None:
            dx.addmm_(dlogits.to(dx.dtype), cast.gate_weight)  # [T, E] @ [E, I] -> [T, I]
    if wanted.lora_a:
        assert x is not None
        dlora_a = wgrad(du, x, lora_a, 1.0)
    if wanted.gate_weight:
        assert x is not None
        assert gate_weight is not None
        dgate_weight = wgrad(dlogits.to(x.dtype), x, gate_weight, 1.0)
    if wanted.gate_bias:
        assert gate_bias is not None
        dgate_bias = dlogits.sum(dim=0).to(gate_bias.dtype)
    if wanted.gate_logits:
        dgate_logits = dlogits.to(logits.dtype)
    return Gradients(dx, dlora_a, dlora_b, dgate_weight, dgate_bias, dgate_logits)


def mix_backward(
    gates: Tensor,  # (T, E)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    h: Tensor,  # what a gate multiplies, from `mix`
    dv: Tensor,  # (T, E, R), still without the scaling
    options: Options,
    sums: Tensor | None,  # (T, 1, 1), of the gates; None: they are 1
) -> tuple[Tensor, Tensor]:
    """du, shaped and typed as u, and dgates (T, E) in the gates' dtype."""
    wide, scaling, dv = gates.dtype, options.scaling, dv.to(gates.dtype)
    du = torch.empty_like(u)
    if options.averages_factors:
        dh = blend(gates, dv).mul_(scaling)
        through_a = torch.bmm(u.to(wide), dh.mT)  # [T, E, R] @ [T, R, 1] -> [T, E, 1]
        dgates = torch.baddbmm(through_a, dv, h.mT, alpha=scaling).squeeze(2)
    else:
        dh = blend(gates, dv).mul_(scaling) if u.shape[1] == 1 else dv * scaling
        dgates = (dv * h).sum(dim=2).mul_(scaling)
    if u.shape[1] == 1:  # a shared A gathers from every expert: under "factors" the same from each, times its gate
        return du.copy_(sums * dh if options.averages_factors and sums is not None else dh), dgates
    return torch.mul(gates[:, :, None], dh, out=du), dgates


def wgrad(coefficients: Tensor, rows: Tensor, parameter: Tensor, scaling: float) -> Tensor:
    """scaling * coefficients^T rows: (T, ...) and (T, F) to the parameter's shape, in its dtype, out of the accumulators."""
    left = coefficients.flatten(1).t()  # [E R, T] @ [T, F] -> [E R, F]
    if parameter.dtype == rows.dtype:
        grad = rows.new_empty(left.shape[0], rows.shape[1]).addmm_(left, rows, beta=0, alpha=scaling)
    else:
        grad = matmul_wide(left, rows).mul_(scaling).to(parameter.dtype)
    return grad.view(parameter.shape)
