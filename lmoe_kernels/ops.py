# SPDX-License-Identifier: Apache-2.0
"""The two torch.library ops, `lmoe_kernels::forward` and `lmoe_kernels::backward`.

torch.compile, torch.export and the profiler treat each of them as one operation. The ops are functional, return a fixed
tuple of tensors, and never return an alias of an input. What is not saved and a gradient that is not wanted are None. The
ops have no derivative formulas; `autograd` defines the derivatives.

The ops do the work that is the same for all backends: they make rows contiguous, disable autocast and autograd, and compute
the frozen product last. The backend writes the delta, and the frozen GEMM adds to it with beta = 1. A compute-bound GEMM can
overlap that read of y with its products, and only the delta is rounded before the sum.

A call that nothing else sees runs the body of an op and not the op, see `something_sees_ops`.

The backend is chosen inside the op, from the actual sizes. A choice during tracing by torch.compile would depend on the
traced sizes. It would be wrong for other sizes if the guards are dropped, and impossible for sizes that are unknown then.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)  # fmt: skip
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from lmoe_kernels import casting, dispatch, dropout
from lmoe_kernels.options import Factors, Gradients, Options, Problem, Saved, Wanted

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)

_library = torch.library.Library("lmoe_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_FACTORS = "Tensor lora_a, Tensor lora_b, Tensor? gate_weight, Tensor? gate_bias, Tensor? gate_logits"
_SAVED = "Tensor? logits, Tensor u, Tensor? route, Tensor? cast"
_OPTIONS = "float scaling, str mixing, int? top_k, bool renormalize, float dropout, bool softmax=True"

_library.define(
    f"forward(Tensor x, {_FACTORS}, Tensor? weight, Tensor? base, Tensor? seed, bool save, str backend, {_OPTIONS})"
    " -> (Tensor y, Tensor logits, Tensor u, Tensor route, Tensor cast)",
    tags=_TAGS,
)
_library.define(
    f"backward(Tensor dy, Tensor? dlogits, Tensor? x, {_FACTORS}, Tensor? weight, Tensor? seed, {_SAVED}, bool[] wanted,"
    f" str backend, {_OPTIONS})"
    " -> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dgate_weight, Tensor dgate_bias, Tensor dgate_logits,"
    " Tensor dweight)",
    tags=_TAGS,
)
forward = torch.ops.lmoe_kernels.forward.default
backward = torch.ops.lmoe_kernels.backward.default


def run_forward(
    x: Tensor,
    factors: Factors,
    weight: Tensor | None,
    base: Tensor | None,
    seed: Tensor | None,
    options: Options,
    *,
    save: bool,
    backend: str,
) -> tuple[tuple[Any, ...], str]:
    """The results of the op `forward`, without the op where nothing but its results matters; and the name of the backend.

    It is the chosen one, so that the backward need not choose again; the requested one if the op ran, which chooses inside.
    """
    tensors = (x, *factors, weight, base, seed)
    if something_sees_ops(x, tensors):
        return forward(*tensors, save, backend, *options), backend
    y, saved, name = _compute_forward(x, factors, weight, base, seed, options, save=save, backend=backend)
    return (y, *(saved or _NOTHING_SAVED)), name


def run_backward(
    dy: Tensor,
    dlogits: Tensor | None,
    x: Tensor | None,
    factors: Factors,
    weight: Tensor | None,
    seed: Tensor | None,
    saved: Saved,
    options: Options,
    *,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """The results of the op `backward`, likewise."""
    tensors = (dy, dlogits, x, *factors, weight, seed, *saved)
    if something_sees_ops(dy, tensors):
        return backward(*tensors, wanted, backend, *options)
    return _compute_backward(dy, dlogits, x, factors, weight, seed, saved, options, wanted=wanted, backend=backend)


def something_sees_ops(x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether anything but the caller may see which op is called, or give it another meaning.

    That is torch.compile, a mode (of a tracer, a fake tensor, a default device), a transform of torch.func, torch.jit.trace,
    the profiler, and a tensor of a subclass or without memory. A call of an op costs 14 us more than one of its body while
    weights stream through the caches between calls (Intel Xeon, 2 cores, 2026-11-26).
    """
    return profiler._is_profiler_enabled or is_traced(x, tensors)


def is_traced(x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether anything but the profiler may give a call another meaning than its results, see `something_sees_ops`."""
    return (
        is_dynamo_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _are_functorch_transforms_active()
        or _is_tracing()
        or not _PLAIN.issuperset(map(type, tensors))
        or x.is_meta
    )


_PLAIN = frozenset((Tensor, Parameter, type(None)))


def _compute_forward(
    x: Tensor,  # (T, I)
    factors: Factors,
    weight: Tensor | None,  # (O, I), the frozen layer's; None for no frozen product
    base: Tensor | None,  # (O), the frozen layer's bias, or (T, O), the output of another layer
    seed: Tensor | None,  # (), int64, of the dropout; None for no dropout
    options: Options,
    *,
    save: bool,
    backend: str,  # a name or "auto"
) -> tuple[Tensor, Saved | None, str]:
    """Compute y = x weight^T + base + delta and, with `save`, what the backward needs; name the chosen backend."""
    x, factors = with_contiguous_rows(x), all_contiguous(factors)
    problem = Problem(factors.sizes(x.shape[0]), x.dtype, x.device)
    name = dispatch.choose("lmoe" if weight is None else "lmoe_linear", problem, backend)
    with no_autocast_or_autograd(x):
        functions = dispatch.load(name) if seed is None else dropout.around(dispatch.load(name), seed)
        y, saved = functions.forward(x, factors, with_contiguous_rows(base), options, save=save)
        if weight is not None:
            y.addmm_(x, weight.t())  # [T, I] @ [I, O] -> [T, O]
    return y, saved, name


def _compute_backward(
    dy: Tensor,  # (T, O)
    dlogits: Tensor | None,  # (T, E), the gradient that arrives at the returned router logits
    x: Tensor | None,  # (T, I), needed only for the gradients of weights
    factors: Factors,
    weight: Tensor | None,  # (O, I)
    seed: Tensor | None,  # (), the forward's
    saved: Saved,
    options: Options,
    *,
    wanted: Sequence[bool],  # the fields of Wanted, and whether the gradient of weight is wanted
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients that are wanted; the others are None. A named backend is one that took the forward."""
    dy, x, factors = with_contiguous_rows(dy), with_contiguous_rows(x), all_contiguous(factors)
    name = backend
    if name == dispatch.AUTO:
        name = dispatch.choose("lmoe", Problem(factors.sizes(dy.shape[0]), dy.dtype, dy.device), name)
    dlogits = _contiguous(dlogits)
    *of_factors, of_weight = wanted
    with no_autocast_or_autograd(dy):
        functions = dispatch.load(name) if seed is None else dropout.around(dispatch.load(name), seed)
        grads: Gradients = functions.backward(dy, dlogits, x, factors, saved, options, wanted=Wanted(*of_factors))
        if grads.x is not None and weight is not None:
            grads.x.addmm_(dy, weight)  # [T, O] @ [O, I] -> [T, I]
        dweight = dy.t() @ x if of_weight and x is not None else None  # [O, T] @ [T, I] -> [O, I]
    return *grads, dweight


# The bodies of the ops, which put the tuples together again. The arguments are named in the schemas.
def _forward(*args: Any) -> tuple[Tensor | None, ...]:
    x, a, b, gate, bias, outside, weight, base, seed, save, backend = args[:11]
    factors, options = Factors(a, b, gate, bias, outside), Options(*args[11:])
    y, saved, _ = _compute_forward(x, factors, weight, base, seed, options, save=save, backend=backend)
    return y, *(_NOTHING_SAVED if saved is None else _complete(saved, x, factors, options))


def _backward(*args: Any) -> tuple[Tensor | None, ...]:
    dy, dlogits, x, a, b, gate, bias, outside, weight, seed, logits, u, route, cast, wanted, backend = args[:16]
    factors, saved, options = (
        Factors(a, b, gate, bias, outside),
        Saved(_contiguous(logits), u, route, cast),
        Options(*args[16:]),
    )
    return _compute_backward(dy, dlogits, x, factors, weight, seed, saved, options, wanted=wanted, backend=backend)


def _forward_fake(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None,
    gate_logits: Tensor | None, weight: Tensor | None, base: Tensor | None, seed: Tensor | None, save: bool, backend: str,
    *options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    tokens, experts, wide = x.shape[0], lora_b.shape[0], torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(tokens, lora_b.shape[2])
    if not save:
        return y, *_NOTHING_SAVED
    logits = None if gate_weight is None else x.new_empty(tokens, experts, dtype=wide)
    saved = Saved(logits, x.new_empty(tokens, *lora_a.shape[:2]))
    return y, *_complete(saved, x, Factors(lora_a, lora_b, gate_weight, gate_bias, gate_logits), Options(*options))


def _backward_fake(
    dy: Tensor, dlogits: Tensor | None, x: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, gate_logits: Tensor | None, weight: Tensor | None, seed: Tensor | None, logits: Tensor | None,
    u: Tensor, route: Tensor | None, cast: Tensor | None, wanted: list[bool], *rest: object,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    (tokens, out_features), in_features = dy.shape, lora_a.shape[2]
    dx, dweight = dy.new_empty(tokens, in_features), dy.new_empty(out_features, in_features)
    likes = (dx, lora_a, lora_b, gate_weight, gate_bias, gate_logits, dweight)
    return tuple(
        like.new_empty(like.shape) if is_wanted and like is not None else None
        for like, is_wanted in zip(likes, wanted, strict=True)
    )


def _complete(saved: Saved, x: Tensor, factors: Factors, options: Options) -> Saved:
    """Add uninitialised memory for what the backend did not save.

    What torch.compile traces must not depend on the backend, which is chosen later.
    """
    if saved.route is None and options.top_k is not None and options.may_group(sizes := factors.sizes(x.shape[0])):
        saved = saved._replace(route=x.new_empty(options.route_shape(sizes), dtype=torch.int32))
    if options.dropout:
        factors = dropout.with_outside_logits(factors, saved.logits)
    if saved.cast is None and (size := casting.cast_size(factors, x.dtype)) > 0:
        saved = saved._replace(cast=x.new_empty(size))
    return saved


def with_contiguous_rows(t: _MaybeTensor) -> _MaybeTensor:
    """The tensor itself if its last dim is contiguous and no two rows overlap in memory, else a contiguous copy."""
    if t is None:
        return t
    if t.is_contiguous() or (t.dim() == 2 and t.stride(1) == 1 and t.stride(0) >= t.shape[1]):
        return t.resolve_neg() if t.is_neg() else t
    return _contiguous(t)


def _contiguous(t: _MaybeTensor) -> _MaybeTensor:
    """A tensor whose memory holds its numbers in order; the imaginary part of a conjugate is stored with the other sign."""
    return t if t is None else t.contiguous().resolve_neg()


def all_contiguous(factors: Factors) -> Factors:
    """The factors themselves if all of them are contiguous, else with contiguous copies."""
    for t in factors:
        if t is not None and (not t.is_contiguous() or t.is_neg()):
            lora_a, lora_b, *rest = factors
            return Factors(_contiguous(lora_a), _contiguous(lora_b), *map(_contiguous, rest))
    return factors


def autocast_is_on() -> bool:
    """Whether autocast is on for any device. PyTorch's own test leaves MPS out (2.11 and 2.13)."""
    return _is_any_autocast_enabled() or (_HAS_MPS and torch.is_autocast_enabled("mps"))


def no_autocast_or_autograd(x: Tensor) -> nullcontext | ExitStack:
    """Disable autocast, which would cast the fp32 tensors inside an op, and gradients.

    Gradients are enabled if an op is called directly, for example by an exported model. In most calls both are disabled.
    """
    if not torch.is_grad_enabled() and not autocast_is_on():
        return _NOTHING
    device = x.device.type
    modes = ExitStack()
    modes.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device):
        modes.enter_context(torch.autocast(device, enabled=False))
    return modes


_HAS_MPS = torch.backends.mps.is_built()
_NOTHING = nullcontext()
_NOTHING_SAVED: tuple[None, ...] = (None,) * len(Saved._fields)

for _key in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("lmoe_kernels::forward", _forward_fake, lib=_library)
torch.library.register_fake("lmoe_kernels::backward", _backward_fake, lib=_library)
