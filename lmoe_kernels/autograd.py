# SPDX-License-Identifier: Apache-2.0
"""The autograd Functions over the ops. They decide which tensors the forward saves for the backward.

The forward saves x (only if the gradient of a weight needs it), the logits and u. Two Functions share the same forward and
backward: the plain one costs less per call, and the transforms of torch.func (grad, vmap) require the `setup_context` form,
whose `apply` takes about 25 us longer (torch 2.13, CPU, 2026-11). Second derivatives are not supported and raise an error.
Without that error PyTorch would treat the gradients as constants, because the backward op has no derivative formula, and
return zeros.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from lmoe_kernels import ops
from lmoe_kernels.options import Factors, Options, Saved

_Context = Any  # torch.autograd.function.FunctionCtx, whose attributes are set at run time
# The arguments of a Function: x and the factors in the order of `Wanted`, weight, base, seed, the backend, the options.
_NO_SECOND_DERIVATIVES = "there are no second derivatives"


def apply(
    x: Tensor,  # (T, I)
    factors: Factors,
    weight: Tensor | None,  # (O, I)
    base: Tensor | None,  # (O) or (T, O)
    seed: Tensor | None,  # (), int64; None for no dropout
    options: Options,
    *,
    return_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Compute y (T, O) and the logits (T, E), both differentiable.

    The logits may be None if they are not to be returned, and always are if an outside router computed them.
    """
    tensors = (x, *factors, weight, base, seed)
    if torch._C._are_functorch_transforms_active():
        return _TransformableFunction.apply(*tensors, backend, options)[:2]
    if is_differentiated(tensors):  # in forward mode the Function raises; the op would drop the tangent
        function = _Function.apply if is_dynamo_compiling() else _apply
        return function(*tensors, backend, options)[:2]
    results, _ = ops.run_forward(x, factors, weight, base, seed, options, save=return_logits, backend=backend)
    return results[:2]


def is_differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether PyTorch may differentiate what is computed from these tensors, apart from the transforms of torch.func."""
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return backward or forward_ad._current_level >= 0


def _forward(*args: Any) -> tuple[tuple[Tensor | None, ...], str]:
    x, *factors, weight, base, seed, backend, options = args
    return ops.run_forward(x, Factors(*factors), weight, base, seed, options, save=True, backend=backend)


def _save(ctx: _Context, args: tuple[Any, ...], results: tuple[Tensor | None, ...], backend: str) -> None:
    x, lora_a, lora_b, gate_weight, gate_bias, gate_logits, weight, base, seed, _, ctx.options = args
    ctx.backend = backend
    _, logits, u, route, cast = results
    ctx.mark_non_differentiable(*(t for t in (u, route, cast) if t is not None))
    ctx.set_materialize_grads(False)
    *ctx.wanted, ctx.base_wanted, _, _, _ = wanted = ctx.needs_input_grad
    of_x, of_a, _, of_gate, _, _, of_weight, *_ = wanted
    ctx.save_for_backward(
        x if of_a or of_gate or of_weight else None,
        lora_a,
        lora_b,
        gate_weight,
        gate_bias,
        gate_logits,
        weight if of_x else None,
        seed,
        logits,
        u,
        route,
        cast,
    )
    ctx.base_dim = None if base is None else base.dim()


def _backward(
    ctx: _Context, op: Callable[..., tuple[Tensor | None, ...]], dy: Tensor | None, dlogits: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    lora_b, u = saved[2], saved[9]
    # dy is None if the loss depends only on the router logits
    grad_y: Tensor = u.new_zeros(u.shape[0], lora_b.shape[2]) if dy is None else dy
    grads: tuple[Tensor | None, ...] = (None,) * len(ctx.wanted)
    if any(ctx.wanted):
        grads = op(grad_y, dlogits, *saved, ctx.wanted, ctx.backend, ctx.options)
    dbase = None
    if ctx.base_wanted:
        dbase = grad_y if ctx.base_dim == 2 else grad_y.sum(dim=0)
    return *grads, dbase, None, None, None


def _gradients(*args: Any) -> tuple[Tensor | None, ...]:
    dy, dlogits, x, a, b, gate, bias, outside, weight, seed, logits, u, route, cast, wanted, backend, options = args
    factors, saved = Factors(a, b, gate, bias, outside), Saved(logits, u, route, cast)
    return ops.run_backward(dy, dlogits, x, factors, weight, seed, saved, options, wanted=wanted, backend=backend)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, *args: Any) -> tuple[Tensor | None, ...]:
        results, backend = _forward(*args)
        _save(ctx, args, results, backend)
        return results

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable raises only if the incoming gradient requires grad
            raise RuntimeError(f"lmoe: create_graph must be False, got True: {_NO_SECOND_DERIVATIVES}")
        return _backward(ctx, _gradients, *grads)


# The method under `torch.autograd.Function.apply`, which prepares for transforms of torch.func. None is active here, and it
# takes 15 us while weights stream through the caches between calls (Intel Xeon, 2 cores, 2026-11-26). torch.compile of
# PyTorch 2.11 cannot trace this method.
_apply = super(torch.autograd.Function, _Function).apply  # pyright: ignore[reportAttributeAccessIssue]


class _TransformableFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        return _forward(*args)[0]

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *_, backend, _ = inputs
        _save(ctx, inputs, output, backend)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, _TransformableBackward.apply, *grads)

    @staticmethod
    def jvp(ctx: _Context, *tangents: Any) -> Any:
        must = "a derivative must be of first order and in reverse mode"
        raise NotImplementedError(f"lmoe: {must}, got a jvp (as in jacfwd and hessian): {_NO_SECOND_DERIVATIVES}")


class _TransformableBackward(torch.autograd.Function):
    """The backward under the transforms of torch.func: an outer transform may try to differentiate it, and this raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        return _gradients(*args)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: the backward has no derivative."""

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        must = "a derivative must be of first order"
        raise RuntimeError(f"lmoe: {must}, got the derivative of a gradient: {_NO_SECOND_DERIVATIVES}")
