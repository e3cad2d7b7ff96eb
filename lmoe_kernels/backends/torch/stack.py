# SPDX-License-Identifier: Apache-2.0
"""Stacks on ATen: n projections that read the same x share its products, the mix, and what their backward does with x.

u and the logits of all projections are one product each, with rows (n E R, I) and (n E, I). The projections of a token
follow each other in memory, so that the mix of n projections is that of one with n times as many tokens. Only the products
with each B, whose features differ, are made one by one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_kernels.backends.torch.backward import mix_backward
from lmoe_kernels.backends.torch.forward import expand, gate_softmax, in_dtype, mix, of_kept, row_and_column
from lmoe_kernels.options import Factors, Gradients, Options, StackSaved, Wanted
from lmoe_kernels.products import linear_wide, rows_gradient, weight_gradient


def forward(
    x: Tensor,  # (T, I), not empty
    stack: Sequence[Factors],  # all of the same sizes but O, and all with gates of their own or all without
    bases: Sequence[Tensor | None],  # (O) or (T, O) of each
    options: Options,
    *,
    save: bool,
) -> tuple[list[Tensor], list[Tensor], StackSaved | None]:
    """The delta of each projection, added to its base; the logits (T, E) of each; and with `save` what `backward` needs."""
    tokens, count, (experts, rank, _) = x.shape[0], len(stack), stack[0].lora_b.shape
    rows, lora_b = _copies(stack, x.dtype)
    of_a = rows[: count * experts * rank]
    u = F.linear(x, of_a).view(tokens * count, experts, rank)  # [T, I] @ [I, n E R] -> [T, n E R]
    own_logits = None if len(of_a) == len(rows) else _own_logits(x, stack, rows[len(of_a) :])
    logits = (_outside_logits(stack) if own_logits is None else own_logits).view(tokens * count, experts)
    softmax, dropped = gate_softmax(logits, x.dtype, options)
    gates, sums = of_kept(softmax, dropped)
    _, v = mix(*row_and_column(gates, options), u, options, sums)
    of_projection = v.view(tokens, count, experts * rank).unbind(1)
    ys = [expand(v, b, base) for v, b, base in zip(of_projection, lora_b, bases, strict=True)]
    if not save:
        return ys, list(logits.view(tokens, count, experts).unbind(1)), None
    return ys, list(logits.view(tokens, count, experts).unbind(1)), StackSaved(own_logits, u, rows, lora_b)


def backward(
    dys: Sequence[Tensor | None],  # (T, O) of each projection; None if no gradient arrives at it
    dlogits_in: Sequence[Tensor | None],  # (T, E), the gradients that arrive at the returned router logits
    x: Tensor | None,  # (T, I); needed for the gradients of A and of gates
    stack: Sequence[Factors],
    saved: StackSaved,
    options: Options,
    *,
    wanted: Sequence[Wanted],
) -> tuple[Tensor | None, list[Gradients]]:
    """The gradient of x through all projections, and the gradients of each one's factors, without that of x."""
    own_logits, u, rows, lora_b = saved
    count, (experts, rank, _) = len(stack), lora_b[0].shape
    tokens = len(u) // count
    logits = (_outside_logits(stack) if own_logits is None else own_logits).view(tokens * count, experts)
    softmax, dropped = gate_softmax(logits, u.dtype, options)
    gates, sums = of_kept(softmax, dropped)
    row, column = row_and_column(gates, options)
    h, v = mix(row, column, u, options, sums)
    of_projection = v.view(tokens, count, experts * rank).unbind(1)
    grads = [
        Gradients(lora_b=weight_gradient(v, dy, f.lora_b) if w.lora_b and dy is not None else None)
        for v, dy, f, w in zip(of_projection, dys, stack, wanted, strict=True)
    ]
    if not any(w.x or w.lora_a or w.gate for w in wanted):
        return None, grads

    dv = in_dtype(_stacked_dv(dys, lora_b, u), gates.dtype)
    du, dgates = mix_backward(row, column, u, h, dv, options, sums)
    if dropped is not None:
        dgates = dgates.scatter(1, dropped, 0.0)
    dlogits = torch._softmax_backward_data(dgates, softmax, 1, softmax.dtype).view(tokens, count, experts)
    for i, incoming in enumerate(dlogits_in):
        if incoming is not None:
            dlogits[:, i] += incoming

    columns = du.view(tokens, count * experts * rank)
    if own_logits is not None:
        columns = torch.cat([columns, in_dtype(dlogits, u.dtype).view(tokens, count * experts)], dim=1)
    dx = torch.mm(columns, rows) if any(w.x for w in wanted) else None  # [T, n E R + n E] @ [n E R + n E, I] -> [T, I]
    of_rows = _gradients_of_rows(columns, x, stack, wanted)
    return dx, [
        g._replace(
            lora_a=of_rows[i].view(f.lora_a.shape) if w.lora_a else None,
            gate_weight=of_rows[count + i] if w.gate_weight else None,
            gate_bias=dlogits[:, i].sum(dim=0).to(f.gate_bias.dtype) if w.gate_bias and f.gate_bias is not None else None,
            gate_logits=dlogits[:, i].to(logits.dtype) if w.gate_logits else None,
        )
        for i, (g, f, w) in enumerate(zip(grads, stack, wanted, strict=True))
    ]


def _copies(stack: Sequence[Factors], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`StackSaved.rows` and `lora_b`. Everything that is copied is copied by one kernel."""
    sources = [factors.lora_a.flatten(0, 1) for factors in stack]
    sources += [factors.gate_weight for factors in stack if factors.gate_weight is not None]
    lengths = [len(rows) for rows in sources]
    rows = sources[0].new_empty(sum(lengths), sources[0].shape[1], dtype=dtype)
    targets = list(rows.split(lengths))
    lora_b = []
    for factors in stack:
        b = factors.lora_b
        if b.dtype != dtype:
            sources.append(b)
            b = b.new_empty(b.shape, dtype=dtype)
            targets.append(b)
        lora_b.append(b)
    torch._foreach_copy_(targets, sources)
    return rows, tuple(lora_b)


def _own_logits(x: Tensor, stack: Sequence[Factors], rows: Tensor) -> Tensor:
    """The router logits (T, n E) of the projections' own gates."""
    logits = linear_wide(x, rows)  # [T, I] @ [I, n E] -> [T, n E]
    if any(factors.gate_bias is not None for factors in stack):
        for factors, own in zip(stack, logits.chunk(len(stack), dim=1), strict=True):
            if factors.gate_bias is not None:
                own += factors.gate_bias
    return logits


def _outside_logits(stack: Sequence[Factors]) -> Tensor:
    """The router logits (T, n, E) of outside routers."""
    return torch.stack([factors.gate_logits for factors in stack if factors.gate_logits is not None], dim=1)


def _stacked_dv(dys: Sequence[Tensor | None], lora_b: Sequence[Tensor], u: Tensor) -> Tensor:
    """dv (T n, E, R) of all projections, without the scaling; 0 where no gradient arrives."""
    dv, (experts, rank, _) = torch.empty_like(u), lora_b[0].shape
    for dy, b, out in zip(dys, lora_b, dv.view(-1, len(lora_b), experts * rank).unbind(1), strict=True):
        if dy is None:
            out.zero_()
        else:
            torch.mm(dy, b.view(experts * rank, -1).t(), out=out)  # [T, O] @ [O, E R] -> [T, E R]
    return dv


def _gradients_of_rows(
    columns: Tensor, x: Tensor | None, stack: Sequence[Factors], wanted: Sequence[Wanted]
) -> Sequence[Tensor]:
    """The gradients of all A (E R, I), then those of all gates (E, I), by one product; empty if none of them is wanted."""
    of_a, of_gates = any(w.lora_a for w in wanted), any(w.gate_weight for w in wanted)
    if not (of_a or of_gates):
        return ()
    assert x is not None
    count, (experts, rank, _) = len(stack), stack[0].lora_b.shape
    lengths = [experts * rank] * count
    if of_gates:
        lengths += [experts] * count
    return rows_gradient(columns[:, : sum(lengths)], x, stack[0].lora_a.dtype).split(lengths)
