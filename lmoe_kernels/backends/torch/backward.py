"""Backward of the `torch` backend: shrink with B, mix backward, expand with A, and the three weight gradients.

Nothing is differentiated automatically and nothing is computed that `output_mask` does not ask for.
"""

import torch
from torch import Tensor

from lmoe_kernels.backends.torch.forward import blend, expand, gate_softmax, matmul_wide, mix, of_kept, shrink, sums_of


def backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I)
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    logits: Tensor,  # (T, E)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    scaling: float,
    mixing: str,
    top_k: int | None,
    renormalize: bool,
    output_mask: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients asked for; see `lmoe_kernels.reference.backward` for the contract."""
    want_x, want_a, want_b, want_gate = output_mask
    softmax, dropped = gate_softmax(logits, dy.dtype, top_k, renormalize)
    gates = of_kept(softmax, dropped)
    sums = sums_of(gates, dropped)
    h, v = mix(gates, u, mixing, sums)
    dlora_b = wgrad(v, dy, lora_b, scaling) if want_b else None
    if not (want_x or want_a or want_gate):
        return None, None, dlora_b, None

    du, dgates = mix_backward(gates, u, h, shrink(dy, lora_b), scaling, mixing, sums)
    dlogits = torch.ops.aten._softmax_backward_data(of_kept(dgates, dropped), softmax, 1, softmax.dtype)
    if dlogits_in is not None:
        dlogits += dlogits_in

    dx = dlora_a = dgate = None
    if want_x:
        dx = expand(du, lora_a, None, 1.0)
        if gate_weight is not None:
            dx.addmm_(dlogits.to(dx.dtype), gate_weight.to(dx.dtype))  # [T, E] @ [E, I] -> [T, I]
    if want_a:
        assert x is not None
        dlora_a = wgrad(du, x, lora_a, 1.0)
    if want_gate and gate_weight is not None:
        assert x is not None
        dgate = wgrad(dlogits.to(x.dtype), x, gate_weight, 1.0)
    elif want_gate:
        dgate = dlogits.to(logits.dtype)
    return dx, dlora_a, dlora_b, dgate


def mix_backward(
    gates: Tensor,  # (T, E)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    h: Tensor,  # what a gate multiplies, from `mix`
    dv: Tensor,  # (T, E, R), still without the scaling
    scaling: float,
    mixing: str,
    sums: Tensor | None,  # (T, 1, 1), of the gates; None: they are 1
) -> tuple[Tensor, Tensor]:
    """du, shaped and typed as u, and dgates (T, E) in the gates' dtype."""
    wide, dv = gates.dtype, dv.to(gates.dtype)
    du = torch.empty_like(u)
    if mixing == "factors":
        dh = blend(gates, dv).mul_(scaling)
        through_a = torch.bmm(u.to(wide), dh.mT)  # [T, E, R] @ [T, R, 1] -> [T, E, 1]
        dgates = torch.baddbmm(through_a, dv, h.mT, alpha=scaling).squeeze(2)
    else:
        dh = blend(gates, dv).mul_(scaling) if u.shape[1] == 1 else dv * scaling
        dgates = (dv * h).sum(dim=2).mul_(scaling)
    if u.shape[1] == 1:  # a shared A gathers from every expert: under "factors" the same from each, times its gate
        return du.copy_(dh if mixing == "outputs" or sums is None else sums * dh), dgates
    return torch.mul(gates[:, :, None], dh, out=du), dgates


def wgrad(coefficients: Tensor, rows: Tensor, parameter: Tensor, scaling: float) -> Tensor:
    """scaling * coefficients^T rows: (T, ...) and (T, F) to the parameter's shape, in its dtype, out of the accumulators."""
    left = coefficients.flatten(1).t()  # [E R, T] @ [T, F] -> [E R, F]
    if parameter.dtype == rows.dtype:
        grad = rows.new_empty(left.shape[0], rows.shape[1]).addmm_(left, rows, beta=0, alpha=scaling)
    else:
        grad = matmul_wide(left, rows).mul_(scaling).to(parameter.dtype)
    return grad.view(parameter.shape)
