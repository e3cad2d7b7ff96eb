# SPDX-License-Identifier: Apache-2.0
"""Backward of the `torch` backend: shrink with B, mix backward, expand with A, and the three weight gradients.

Nothing is differentiated automatically, and no gradient is computed that is not wanted.
"""

import torch
from torch import Tensor

from lmoe_kernels.backends.torch.forward import (
    expand,
    flat,
    gate_softmax,
    in_dtype,
    mix,
    of_kept,
    row_and_column,
    shrink,
)  # fmt: skip
from lmoe_kernels.casting import from_buffer
from lmoe_kernels.options import Factors, Gradients, Options, Saved, Wanted
from lmoe_kernels.products import weight_gradient


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
    gates, sums = of_kept(softmax, dropped)
    row, column = row_and_column(gates, options)
    h, v = mix(row, column, u, options, sums)
    dlora_b = weight_gradient(flat(v), dy, lora_b) if wanted.lora_b else None
    if not (wanted.x or wanted.lora_a or wanted.gate):
        return Gradients(None, None, dlora_b)

    dv = in_dtype(shrink(dy, cast.lora_b), gates.dtype)
    du, dgates = mix_backward(row, column, u, h, dv, options, sums)
    if dropped is not None:
        dgates = dgates.scatter(1, dropped, 0.0)
    dlogits = torch._softmax_backward_data(dgates, softmax, 1, softmax.dtype) if options.softmax else dgates
    if dlogits_in is not None:
        dlogits += dlogits_in

    dx = dlora_a = dgate_weight = dgate_bias = dgate_logits = None
    du = flat(du)
    if wanted.x:
        dx = expand(du, cast.lora_a, None)
    if wanted.lora_a:
        assert x is not None
        dlora_a = weight_gradient(du, x, lora_a)
    if gate_weight is not None and (dx is not None or wanted.gate_weight):
        rounded = in_dtype(dlogits, dy.dtype)
        if dx is not None:
            assert cast.gate_weight is not None
            dx.addmm_(rounded, cast.gate_weight)  # [T, E] @ [E, I] -> [T, I]
        if wanted.gate_weight:
            assert x is not None
            dgate_weight = weight_gradient(rounded, x, gate_weight)
    if wanted.gate_bias:
        assert gate_bias is not None
        dgate_bias = dlogits.sum(dim=0).to(gate_bias.dtype)
    if wanted.gate_logits:
        dgate_logits = dlogits.to(logits.dtype)
    return Gradients(dx, dlora_a, dlora_b, dgate_weight, dgate_bias, dgate_logits)


def mix_backward(
    row: Tensor,  # (T, 1, E), scaled
    column: Tensor,  # (T, E, 1)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    h: Tensor,  # of `mix`
    dv: Tensor,  # (T, E, R), in the dtype of the gates, still without the scaling
    options: Options,
    sums: Tensor | None,  # (T, 1, 1), of the gates; None: they are 1
) -> tuple[Tensor, Tensor]:
    """du, shaped and typed as u, and dgates (T, E) in the gates' dtype."""
    wide = row.dtype
    if not options.averages_factors:
        dgates = (dv * h).sum(dim=2).mul_(options.scaling)
        return in_dtype(torch.bmm(row, dv) if u.shape[1] == 1 else row.mT * dv, u.dtype), dgates
    dh = torch.bmm(row, dv)  # [T, 1, E] @ [T, E, R] -> [T, 1, R]
    tall = dv.shape[0], dv.shape[2], 1
    through_a = torch.bmm(in_dtype(u, wide), dh.view(*tall))  # [T, E, R] @ [T, R, 1] -> [T, E, 1]
    dgates = torch.baddbmm(through_a, dv, h.view(*tall)).squeeze(2)
    if u.shape[1] != 1:
        return in_dtype(column * dh, u.dtype), dgates
    return in_dtype(dh if sums is None else sums * dh, u.dtype), dgates  # a shared A gathers the same from every expert
