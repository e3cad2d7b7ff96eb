# SPDX-License-Identifier: Apache-2.0
"""Losses on router logits, which prevent the gate from collapsing onto a few experts."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lmoe_kernels.checks import DTYPES, check_dense, check_positive_int, fail

_MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *DTYPES)


def balance_loss(router_logits: Tensor | Iterable[Tensor], top_k: int = 1, mask: Tensor | None = None) -> Tensor:
    """Compute the load balancing loss of the Switch Transformer: 1 if all experts are used equally, at most E / top_k.

    Semantics:
        chosen = one_hot(logits.topk(top_k).indices).sum(-2).mean(0) / top_k;  mean = logits.softmax(-1).mean(0)
        loss = E * (chosen * mean).sum()

    Args:
        router_logits: (..., E), or several such tensors, which may be on different devices. The loss of several is the mean
            of their losses.
        top_k: number of experts that count as chosen for each token. Use 1, the strongest expert, for dense gates.
        mask: (...) of bool or of numbers >= 0, the weight of each token in the means; None for equal weights. Tokens of
            weight 0 have no effect on the loss and its gradient, even if their logits are NaN. The values of a mask on a
            GPU are not checked.

    Returns:
        a scalar in fp32 (fp64 for fp64), 0 if no token counts. The gradient flows through `mean`, not through `chosen`.

    Raises:
        ValueError: there are no logits or no experts, top_k is not in 1..E, or the mask has another shape or negative
            values.
        TypeError: an argument is not a dense tensor of a supported dtype, or top_k is not an int.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6.
    """

    def loss(logits: Tensor, weights: Tensor) -> Tensor:
        experts = logits.shape[1]
        check_positive_int("balance_loss", "top_k", top_k, at_most=("E", experts))
        best = logits.topk(top_k, dim=1).indices
        chosen = torch.zeros_like(logits).scatter_(1, best, 1.0 / top_k)
        return experts * (_mean(chosen, weights) * _mean(logits.softmax(dim=1), weights)).sum()

    return _mean_over_layers("balance_loss", router_logits, mask, loss)


def router_z_loss(router_logits: Tensor | Iterable[Tensor], mask: Tensor | None = None) -> Tensor:
    """Compute the router z-loss: the mean squared log-sum-exp of the logits, which keeps them small.

    Semantics:
        loss = logits.logsumexp(-1).square().mean()

    Args:
        router_logits: (..., E), or several such tensors, as in `balance_loss`.
        mask: (...), as in `balance_loss`.

    Returns:
        a scalar in fp32 (fp64 for fp64), 0 if no token counts.

    Raises:
        ValueError: as `balance_loss`.
        TypeError: as `balance_loss`.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """

    def loss(logits: Tensor, weights: Tensor) -> Tensor:
        return _mean(logits.logsumexp(dim=1, keepdim=True).square(), weights).squeeze()

    return _mean_over_layers("router_z_loss", router_logits, mask, loss)


def _mean(rows: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of rows (T, F), with weights (T). It is no matrix product, which autocast would compute in half."""
    return (weights[:, None] * rows).sum(dim=0)


def _mean_over_layers(
    op: str, router_logits: Tensor | Iterable[Tensor], mask: Tensor | None, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply loss(logits (T, E), weights (T)) to the logits of every layer. Return the mean, on the first one's device.

    The weights sum to 1, or to 0 if no token counts.
    """
    must = "be a tensor (..., E) or several"
    if not isinstance(router_logits, Iterable) or isinstance(router_logits, Mapping):
        fail(op, "router_logits", must, type(router_logits).__name__, TypeError)
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not layers or any(not isinstance(logits, Tensor) or logits.dim() == 0 for logits in layers):
        got = [type(logits).__name__ for logits in layers]
        fail(op, "router_logits", must, got or "none (is output_router_logits set?)")
    return torch.stack([loss(*_tokens(op, logits, mask)).to(layers[0].device) for logits in layers]).mean()


def _tokens(op: str, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits as (T, E) in fp32 or fp64, and the weights of the tokens (T)."""
    check_dense(op, "router_logits", logits, DTYPES)
    if logits.shape[-1] == 0:
        fail(op, "router_logits", "have shape (..., E) with E >= 1", tuple(logits.shape))
    flat = logits.flatten(end_dim=-2) if logits.dim() > 1 else logits[None]
    flat = flat.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        return flat, flat.new_full((flat.shape[0],), 1.0 / max(1, flat.shape[0]))
    _check_mask(op, mask, logits)
    weights = mask.reshape(-1).to(flat)
    counts = weights > 0
    weights = weights.where(counts, 0)
    return flat.where(counts[:, None], 0), weights / weights.sum().clamp(min=torch.finfo(flat.dtype).tiny)


def _check_mask(op: str, mask: Tensor, logits: Tensor) -> None:
    """Check that a mask fits the logits. Its values are checked only on the CPU, because reading them waits for a GPU."""
    check_dense(op, "mask", mask, _MASK_DTYPES)
    if mask.shape != logits.shape[:-1]:
        fail(op, "mask", f"have the tokens' shape {tuple(logits.shape[:-1])}", tuple(mask.shape))
    if mask.is_meta and not logits.is_meta:
        fail(op, "mask", "have data", "one on the meta device")
    if mask.device.type == "cpu" and mask.dtype.is_signed and not torch.compiler.is_compiling() and bool((mask < 0).any()):
        fail(op, "mask", "be at least 0 for every token", mask.min().item())
