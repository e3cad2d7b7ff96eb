# SPDX-License-Identifier: Apache-2.0
"""Forward of the `torch` backend: shrink, mix, expand, each on ATen.

No per-token factor is built. Projecting a token onto all experts at once and blending afterwards turns the `T R (I + O)`
numbers of the definition into `T E R`, and every large product into one GEMM that all tokens share.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_kernels.casting import cast_factors
from lmoe_kernels.options import Factors, Options, Saved
from lmoe_kernels.products import linear_wide


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
    lora_a, lora_b, gate_weight, gate_bias, logits = factors
    u = shrink(x, lora_a)
    if gate_weight is not None:
        logits = linear_wide(x, gate_weight)  # [T, I] @ [I, E] -> [T, E]
        if gate_bias is not None:
            logits += gate_bias
    assert logits is not None
    softmax, dropped = gate_softmax(logits, x.dtype, options)
    gates, sums = of_kept(softmax, dropped)
    _, v = mix(*row_and_column(gates, options), u, options, sums)
    y = expand(flat(v), lora_b, base)
    if not save:
        return y, None
    return y, Saved(None if gate_weight is None else logits, u, cast=cast)


def shrink(rows: Tensor, factor: Tensor) -> Tensor:
    """Project every row onto the rank rows of all experts: (T, F) and (E, R, F) to (T, E, R)."""
    experts, rank, features = factor.shape
    matrix = factor.view(experts * rank, features)
    return F.linear(rows, matrix).view(-1, experts, rank)  # [T, F] @ [F, E R] -> [T, E R]


def gate_softmax(logits: Tensor, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor | None]:
    """Softmax (T, E), in fp32 at least, over the experts kept or over all; and of all the experts dropped, (T, E - k).

    Of equal logits the lower expert index stays among the `top_k`. None are to be dropped where the softmax has done it.
    Gates that were given are returned as they are, and no index, (T, 0): it says that their sums need not be 1.
    """
    wide, dropped = torch.float64 if dtype is torch.float64 else torch.float32, None
    if not options.softmax:
        return in_dtype(logits, wide), logits.new_empty(logits.shape[0], 0, dtype=torch.int64)
    if options.top_k is not None and (kept := options.kept(logits.shape[1])) < logits.shape[1]:
        dropped = logits.argsort(dim=1, descending=True, stable=True)[:, kept:]
        if options.renormalize:
            logits, dropped = logits.scatter(1, dropped, float("-inf")), None
    return (logits.softmax(1) if logits.dtype is wide else logits.softmax(1, wide)), dropped


def of_kept(softmax: Tensor, dropped: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gates (T, E), 0 for the experts that are still to be dropped; the sum of each token's (T, 1, 1), None where 1."""
    if dropped is None:
        return softmax, None
    gates = softmax.scatter(1, dropped, 0.0)
    return gates, gates.sum(dim=1)[:, None, None]


def row_and_column(gates: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The gates as the left and as the right factor of a blend: a row (T, 1, E) with the scaling, and a column (T, E, 1).

    The gates are the smallest tensor that the scaling can be applied to, for forward and backward alike.
    """
    scaled = gates if options.scaling == 1.0 else gates * options.scaling
    return scaled.unsqueeze(1), gates.unsqueeze(2)


def mix(
    row: Tensor,  # (T, 1, E), scaled
    column: Tensor,  # (T, E, 1)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    options: Options,
    sums: Tensor | None,  # (T, 1, 1), of the gates; None: they are 1
) -> tuple[Tensor, Tensor]:
    """Blend the experts of every token, in the gates' dtype; only v is rounded, once.

    Returns:
        h, the scaled blend (T, 1, R), or u itself (T, E, R) under mixing="outputs"; v (T, E, R), scaled, in u's dtype.
    """
    h = in_dtype(u, row.dtype)
    if not options.averages_factors:
        return h, in_dtype(row.mT * h, u.dtype)
    if u.shape[1] != 1:
        h = torch.bmm(row, h)  # [T, 1, E] @ [T, E, R] -> [T, 1, R]
    elif sums is None:  # under a shared A the blend is u itself, times the gates' sum
        h = h * options.scaling
    else:
        h = sums * h * options.scaling
    return h, in_dtype(column * h, u.dtype)


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype. `to` alone takes a microsecond, several with cold caches, to return the tensor itself."""
    return t if t.dtype is dtype else t.to(dtype)


def expand(coefficients: Tensor, factor: Tensor, base: Tensor | None) -> Tensor:
    """base + coefficients @ factor: (T, E R) and (E, R, F) to (T, F), the sum with `base` made in the GEMM's epilogue."""
    experts, rank, features = factor.shape
    rows = factor.view(experts * rank, features)  # [T, E R] @ [E R, F] -> [T, F]
    return torch.mm(coefficients, rows) if base is None else torch.addmm(base, coefficients, rows)


def flat(coefficients: Tensor) -> Tensor:
    """(T, E, R) as (T, E R). `flatten` takes 17 us with cold caches, `view` 11 (Intel Xeon, 2 cores, 2026-11-26)."""
    tokens, experts, rank = coefficients.shape
    return coefficients.view(tokens, experts * rank)
