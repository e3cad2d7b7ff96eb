# SPDX-License-Identifier: Apache-2.0
"""Forward of the `torch` backend: shrink, mix, expand, each on ATen.

No per-token factor is built. Projecting a token onto all experts at once and blending afterwards turns the `T R (I + O)`
numbers of the definition into `T E R`, and every large product into one GEMM that all tokens share.
"""

import torch
from torch import Tensor

from lmoe_kernels.casting import cast_factors
from lmoe_kernels.options import Factors, Options, Saved


def forward(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """The delta, added to `base`; see `lmoe_kernels.reference.forward` for the contract."""
    factors, cast = cast_factors(factors, x.dtype)
    u = shrink(x, factors.lora_a)
    if factors.gate_weight is not None:
        logits = matmul_wide(x, factors.gate_weight.t())  # [T, I] @ [I, E] -> [T, E]
        if factors.gate_bias is not None:
            logits += factors.gate_bias
    else:
        assert factors.gate_logits is not None
        logits = factors.gate_logits
    softmax, dropped = gate_softmax(logits, x.dtype, options)
    gates = of_kept(softmax, dropped)
    _, v = mix(gates, u, options, sums_of(gates, dropped))
    y = expand(v, factors.lora_b, base, options.scaling)
    if not save:
        return y, None
    return y, Saved(logits if factors.gate_weight is not None else None, u, cast=cast)


def shrink(rows: Tensor, factor: Tensor) -> Tensor:
    """Project every row onto the rank rows of all experts: (T, F) and (E, R, F) to (T, E, R)."""
    return (rows @ factor.flatten(0, 1).t()).unflatten(1, factor.shape[:2])  # [T, F] @ [F, E R] -> [T, E R]


def gate_softmax(logits: Tensor, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor | None]:
    """Softmax (T, E), in fp32 at least, over the experts kept or over all; and of all the experts dropped, (T, E - k).

    Of equal logits the lower expert index stays among the `top_k`. None are to be dropped where the softmax has done it.
    """
    wide, dropped, kept = torch.promote_types(dtype, torch.float32), None, options.kept(logits.shape[1])
    if kept < logits.shape[1]:
        dropped = logits.argsort(dim=1, descending=True, stable=True)[:, kept:]
        if options.renormalize:
            logits, dropped = logits.scatter(1, dropped, float("-inf")), None
    return logits.softmax(dim=1, dtype=wide), dropped


def of_kept(values: Tensor, dropped: Tensor | None) -> Tensor:
    """The values (T, E) of the experts kept, 0 for those that are still to be dropped."""
    return values if dropped is None else values.scatter(1, dropped, 0.0)


def sums_of(gates: Tensor, dropped: Tensor | None) -> Tensor | None:
    """The sum of each token's gates, (T, 1, 1); None where it is 1."""
    return None if dropped is None else gates.sum(dim=1)[:, None, None]


def mix(gates: Tensor, u: Tensor, options: Options, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Blend the experts of every token, in the gates' dtype; only v is rounded, once.

    Returns:
        h (T, 1, R), or u itself (T, E, R) under mixing="outputs": what a gate multiplies; v (T, E, R) in u's dtype.
    """
    alone = not options.averages_factors or u.shape[1] == 1  # under a shared A the blend is u itself, times the gates' sum
    h = u.to(gates.dtype) if alone else blend(gates, u)
    if options.averages_factors and u.shape[1] == 1 and sums is not None:
        h = sums * h
    v = u.new_empty(gates.shape[0], gates.shape[1], u.shape[2])
    return h, torch.mul(gates[:, :, None], h, out=v)


def blend(gates: Tensor, per_expert: Tensor) -> Tensor:
    """sum_e gates[t,e] per_expert[t,e,r], as (T, 1, R) in the gates' dtype."""
    return torch.bmm(gates[:, None, :], per_expert.to(gates.dtype))  # [T, 1, E] @ [T, E, R] -> [T, 1, R]


def expand(v: Tensor, factor: Tensor, base: Tensor | None, scaling: float) -> Tensor:
    """base + scaling * sum_e,r v[t,e,r] factor[e,r,:], the sum with `base` made in the GEMM's epilogue."""
    flat_v, flat = v.flatten(1), factor.flatten(0, 1)
    if base is not None:
        return torch.addmm(base, flat_v, flat, alpha=scaling)  # [T, E R] @ [E R, F] -> [T, F]
    out = v.new_empty(v.shape[0], factor.shape[2])
    return out.addmm_(flat_v, flat, beta=0, alpha=scaling)


def matmul_wide(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` as the accumulators hold it: fp32 for half-precision operands, unrounded."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if wide == a.dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)  # ATen's CPU products round their result to the operands' dtype
