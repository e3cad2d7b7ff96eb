# SPDX-License-Identifier: Apache-2.0
"""Stacks: projections that read the same x, such as q, k and v, computed together.

Their results are those of separate calls of `lmoe_linear`, within rounding. The A and the gates of all projections are rows
of one matrix, which x meets in one pass. The backward makes the gradients of all rows in one product with x, and the
gradient of x once. Each frozen product is still one GEMM, which adds to the projection's delta, and in the backward to the
gradient of x.

torch.compile and other tracers see separate calls, since there is no op for stacks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lmoe_kernels import dispatch, ops
from lmoe_kernels.options import Factors, Options, Problem, StackSaved, Wanted

_Context = Any  # torch.autograd.function.FunctionCtx, whose attributes are set at run time


class Projection(NamedTuple):
    """One of the projections of a stack: its experts and gate, and its frozen linear layer."""

    lora_a: Tensor  # (E, R, I)
    lora_b: Tensor  # (E, R, O)
    gate_weight: Tensor | None  # (E, I)
    gate_bias: Tensor | None  # (E)
    gate_logits: Tensor | None  # (T, E)
    weight: Tensor  # (O, I)
    bias: Tensor | None  # (O)

    def factors(self) -> Factors:
        """The experts and the gate."""
        return Factors(*self[:5])


def backend_of(x: Tensor, stack: Sequence[Projection], backend: str) -> str | None:
    """The backend that computes this stack; None if the projections must be computed by separate calls.

    They must be if a tracer may see the call, if a tensor does not fit, if the backends that the projections would get alone
    differ or have no code for stacks, or if a stack does not pay. Errors are left to the separate calls.

    Args:
        x: (T, I), already cast by autocast.
        stack: the projections, which all have the same options. Logits of outside routers may still be missing.
        backend: a name or "auto".
    """
    if len(stack) < 2 or x.numel() == 0 or forward_ad._current_level >= 0:
        return None
    if ops.is_traced(x, (x, *(t for projection in stack for t in projection))):
        return None
    if not all(_fits(projection, x, stack[0]) for projection in stack) or not _pays(x, stack):
        return None
    problems = {Problem(projection.factors().sizes(x.shape[0]), x.dtype, x.device) for projection in stack}
    if backend != dispatch.AUTO and any(dispatch.BACKENDS[backend].why_not(problem) for problem in problems):
        return None
    names = {dispatch.choose("lmoe_linear", problem, backend) for problem in problems}
    name = names.pop()
    return None if names or dispatch.load_stack(name) is None else name


def _fits(projection: Projection, x: Tensor, first: Projection) -> bool:
    """Whether the shapes, dtypes and devices of a projection are those that a stack takes.

    Layers whose parameters another library keeps elsewhere between their calls, sharded or on another device, do not fit.
    """
    lora_a, lora_b, gate_weight, gate_bias, _, weight, bias = projection
    if lora_a.shape != first.lora_a.shape or lora_b.dim() != 3 or 0 in lora_b.shape:
        return False
    (experts, rank, out_features), in_features = lora_b.shape, x.shape[1]
    of_x, of_factors = x.dtype, lora_a.dtype
    if of_factors not in (of_x, torch.float32) or of_factors != first.lora_a.dtype:
        return False
    if (gate_weight is None) != (first.gate_weight is None):
        return False
    device = x.device
    return all(
        t is None or (t.shape == shape and t.dtype == dtype and t.device == device)
        for t, shape, dtype in (
            (lora_a, (experts, rank, in_features), of_factors),
            (lora_b, (experts, rank, out_features), of_factors),
            (gate_weight, (experts, in_features), of_factors),
            (gate_bias, (experts,), of_factors),
            (weight, (out_features, in_features), of_x),
            (bias, (out_features,), of_x),
        )
    )


def _pays(x: Tensor, stack: Sequence[Projection]) -> bool:
    """Whether to save n - 1 reads of x is worth a copy of the rows of all A and gates, which reads and writes each of them.

    Rows of another dtype than x's are copied by separate calls too.
    """
    lora_a = stack[0].lora_a
    if lora_a.dtype != x.dtype:
        return True
    experts, rank, _ = lora_a.shape
    return x.shape[0] * (len(stack) - 1) >= 2 * len(stack) * experts * (rank + 1)


def apply(
    x: Tensor,  # (T, I)
    stack: Sequence[Projection],
    options: Options,
    *,
    backend: str,  # that of `backend_of`
    return_logits: bool,
) -> list[tuple[Tensor, Tensor | None]]:
    """y (T, O) of each projection, and with `return_logits` the logits (T, E) that its own gate computed, else None."""
    tensors, count = [t for projection in stack for t in projection], len(stack)
    return_logits = return_logits and stack[0].gate_weight is not None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        results = _Function.apply(x, options, backend, return_logits, *tensors)
    else:
        ys, logits, _ = _forward(x, stack, options, backend, save=False)
        results = (*ys, *logits)
    return list(zip(results[:count], results[count:] if return_logits else (None,) * count, strict=True))


def _forward(
    x: Tensor, stack: Sequence[Projection], options: Options, backend: str, *, save: bool
) -> tuple[list[Tensor], list[Tensor], StackSaved | None]:
    """What the backend's function `forward` returns, with the frozen products added to each y."""
    x, factors = ops.with_contiguous_rows(x), [ops.all_contiguous(projection.factors()) for projection in stack]
    with ops.no_autocast_or_autograd(x):
        forward = _functions(backend).forward
        ys, logits, saved = forward(x, factors, [projection.bias for projection in stack], options, save=save)
        for y, projection in zip(ys, stack, strict=True):
            y.addmm_(x, projection.weight.t())  # [T, I] @ [I, O] -> [T, O]
    return ys, logits, saved


def _functions(backend: str) -> dispatch.StackFunctions:
    functions = dispatch.load_stack(backend)
    assert functions is not None
    return functions


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, options: Options, backend: str, return_logits: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        stack = [Projection(*own) for own in _by_projection(tensors)]
        ys, logits, saved = _forward(x, stack, options, backend, save=True)
        assert saved is not None
        ctx.options, ctx.backend, ctx.count = options, backend, len(stack)
        ctx.set_materialize_grads(False)
        ctx.of_x, _, _, _, *of_tensors = ctx.needs_input_grad
        ctx.wanted = [_WantedOf(*own) for own in _by_projection(of_tensors)]
        needs_x = any(own.lora_a or own.gate_weight or own.weight for own in ctx.wanted)
        kept = [t for p in stack for t in p._replace(weight=p.weight if ctx.of_x else None, bias=None)]
        *of_backward, lora_b = saved
        ctx.save_for_backward(x if needs_x else None, *of_backward, *lora_b, *kept)
        return (*ys, *(t.clone() for t in logits)) if return_logits else tuple(ys)  # these are views of saved logits

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable raises only if the incoming gradient requires grad
            raise RuntimeError("lmoe: create_graph must be False, got True: there are no second derivatives")
        count = ctx.count
        x, logits, u, rows, *tensors = ctx.saved_tensors
        saved = StackSaved(logits, u, rows, tuple(tensors[:count]))
        stack = [Projection(*own) for own in _by_projection(tensors[count:])]
        dlogits = grads[count:] or (None,) * count
        dys = [
            dy if dl is None or dy is not None else u.new_zeros(dl.shape[0], p.lora_b.shape[2])  # only the logits were used
            for dy, dl, p in zip(grads[:count], dlogits, stack, strict=True)
        ]
        dx, of_stack = _gradients(ctx, [ops.with_contiguous_rows(dy) for dy in dys], dlogits, x, stack, saved)
        return dx, None, None, None, *of_stack


class _WantedOf(NamedTuple):
    """Which gradients of one projection are wanted."""

    lora_a: bool
    lora_b: bool
    gate_weight: bool
    gate_bias: bool
    gate_logits: bool
    weight: bool
    bias: bool


def _by_projection(values: Sequence[Any]) -> list[Sequence[Any]]:
    """The values of each projection, in the order of the fields of `Projection`."""
    width = len(Projection._fields)
    return [values[start : start + width] for start in range(0, len(values), width)]


def _gradients(
    ctx: _Context,
    dys: Sequence[Tensor | None],  # (T, O); None for a projection that the loss does not depend on
    dlogits: Sequence[Tensor | None],  # (T, E)
    x: Tensor | None,  # (T, I)
    stack: Sequence[Projection],  # without bias, and without weight unless the gradient of x is wanted
    saved: StackSaved,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x, and those of the tensors of all projections in their order."""
    x = ops.with_contiguous_rows(x)
    factors = [ops.all_contiguous(projection.factors()) for projection in stack]
    reached = [dy is not None for dy in dys]
    wanted = [Wanted(*(r and flag for flag in (ctx.of_x, *own[:5]))) for own, r in zip(ctx.wanted, reached, strict=True)]
    results: list[Tensor | None] = []
    with ops.no_autocast_or_autograd(saved.u):
        backward = _functions(ctx.backend).backward
        dx, of_factors = backward(dys, dlogits, x, factors, saved, ctx.options, wanted=wanted)
        for dy, own, projection, grads in zip(dys, ctx.wanted, stack, of_factors, strict=True):
            if dx is not None and dy is not None:
                dx.addmm_(dy, projection.weight)  # [T, O] @ [O, I] -> [T, I]
            of_weight = dy.t() @ x if own.weight and dy is not None and x is not None else None  # [O, T] @ [T, I] -> [O, I]
            results += [*grads[1:], of_weight, dy.sum(dim=0) if own.bias and dy is not None else None]
    return dx, results
