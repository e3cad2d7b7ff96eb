"""The autograd Functions over the ops: what is saved between forward and backward, and nothing else.

Saved are x (only where a weight gradient wants it), the logits and u. Two Functions share one forward and one backward: the
plain one has the lower launch cost; functorch's transforms (torch.func.grad, vmap) demand the `setup_context` form, whose
`apply` costs some 25 us more (torch 2.13, CPU, 2026-11). There are no second derivatives, and asking for one is an error:
left alone, PyTorch would take the gradients of an op without a formula for constants, and return zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lmoe_kernels import ops

_Context = Any  # torch.autograd.function.FunctionCtx; its attributes are set at run time
_NO_MORE = "there are no second derivatives"


def apply(
    x: Tensor,  # (T, I)
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    gate_logits: Tensor | None,  # (T, E)
    weight: Tensor | None,  # (O, I)
    base: Tensor | None,  # (O) or (T, O)
    scaling: float,
    mixing: str,
    top_k: int | None,
    renormalize: bool,
    return_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y (T, O) and logits (T, E), differentiable; the logits are empty where nobody wants them or they came from outside."""
    args = (x, lora_a, lora_b, gate_weight, gate_logits, weight, base, scaling, mixing, top_k, renormalize)
    if torch._C._are_functorch_transforms_active():
        return _TransformableFunction.apply(*args, True, backend)[:2]
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:7])
    if backward or forward_ad._current_level >= 0:  # forward mode is refused by the Function; an op would lose the tangent
        return _Function.apply(*args, True, backend)[:2]
    return ops.forward(*args, return_logits, backend)[:2]


def _save(ctx: _Context, args: tuple[Any, ...], results: tuple[Tensor, Tensor, Tensor]) -> None:
    x, lora_a, lora_b, gate_weight, gate_logits, weight, base = args[:7]
    _, logits, u = results
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    want_x, want_a, _, want_gate, _, want_weight, _ = ctx.needs_input_grad[:7]
    ctx.save_for_backward(
        x if want_a or want_gate or want_weight else None,
        lora_a,
        lora_b,
        gate_weight,
        logits if gate_logits is None else gate_logits,
        u,
        weight if want_x else None,
    )
    ctx.options = args[7:11]
    ctx.backend = args[12]
    ctx.base_dim = None if base is None else base.dim()


def _backward(
    ctx: _Context, op: Callable[..., tuple[Tensor, ...]], dy: Tensor | None, dlogits: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, lora_a, lora_b, gate_weight, logits, u, weight = ctx.saved_tensors
    # no dy: the loss looked at the router logits alone
    grad_y: Tensor = u.new_zeros(u.shape[0], lora_b.shape[2]) if dy is None else dy
    want_x, want_a, want_b, want_gate_weight, want_gate_logits, want_weight, want_base = ctx.needs_input_grad[:7]
    mask = [want_x, want_a, want_b, want_gate_weight or want_gate_logits, want_weight]
    grads: list[Tensor | None] = [None] * 5
    if any(mask):
        results = op(grad_y, dlogits, x, lora_a, lora_b, gate_weight, logits, u, weight, *ctx.options, mask, ctx.backend)
        grads = [grad if asked else None for grad, asked in zip(results, mask, strict=True)]
    dx, dlora_a, dlora_b, dgate, dweight = grads
    dbase = None
    if want_base:
        dbase = grad_y if ctx.base_dim == 2 else grad_y.sum(dim=0)
    dgate_weight, dgate_logits = (None, dgate) if gate_weight is None else (dgate, None)
    return dx, dlora_a, dlora_b, dgate_weight, dgate_logits, dweight, dbase, *[None] * 6


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        results = ops.forward(*args)
        _save(ctx, args, results)
        return results

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable lets it pass where the arriving gradient is a constant
            raise RuntimeError(f"lmoe: create_graph must be False, got True: {_NO_MORE}")
        return _backward(ctx, ops.backward, *grads)


class _TransformableFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.forward(*args)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, _TransformableBackward.apply, *grads)

    @staticmethod
    def jvp(ctx: _Context, *tangents: Any) -> Any:
        must = "a derivative must be a first one in reverse mode"
        raise NotImplementedError(f"lmoe: {must}, got a jvp, as in jacfwd and hessian: {_NO_MORE}")


class _TransformableBackward(torch.autograd.Function):
    """The backward under functorch's transforms, which differentiate whatever a level above asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.backward(*args)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no derivative to take."""

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"lmoe: a derivative must be a first one, got that of a gradient: {_NO_MORE}")
