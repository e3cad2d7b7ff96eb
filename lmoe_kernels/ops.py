"""The two operations as torch.library ops: what torch.compile, torch.export and the profiler see.

`lmoe_kernels::forward` and `lmoe_kernels::backward` are functional, return a fixed tuple of tensors, and alias none of their
inputs. A gradient that is not wanted is None; logits and u that are not to be saved are empty. The ops have no gradients of
their own: `autograd` gives them. Their bodies hold what all backends share: rows are made contiguous, autocast and autograd
are switched off, and the frozen product comes last. The backend writes the (small) delta, and the frozen GEMM adds into it
with beta = 1: the second half of that read-modify-write hides in a compute-bound GEMM, and only the delta is rounded before
the sum.

A backend is chosen inside an op, by the sizes that it really gets. A choice made while torch.compile traces would be one of
the traced sizes, and wrong for others wherever the guards are dropped; sizes that are not known then could not be compared.
"""

from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmoe_kernels import dispatch
from lmoe_kernels.options import Factors, Gradients, Options, Problem, Saved, Wanted

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)

_library = torch.library.Library("lmoe_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_FACTORS = "Tensor lora_a, Tensor lora_b, Tensor? gate_weight, Tensor? gate_bias, Tensor? gate_logits"
_OPTIONS = "float scaling, str mixing, int? top_k, bool renormalize"

_library.define(
    f"forward(Tensor x, {_FACTORS}, Tensor? weight, Tensor? base, bool save, str backend, {_OPTIONS})"
    " -> (Tensor y, Tensor logits, Tensor u)",
    tags=_TAGS,
)
_library.define(
    f"backward(Tensor dy, Tensor? dlogits, Tensor? x, {_FACTORS}, Tensor? weight, Tensor? logits, Tensor u, bool[] wanted,"
    f" str backend, {_OPTIONS})"
    " -> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dgate_weight, Tensor dgate_bias, Tensor dgate_logits,"
    " Tensor dweight)",
    tags=_TAGS,
)
forward = torch.ops.lmoe_kernels.forward.default
backward = torch.ops.lmoe_kernels.backward.default


def _forward(
    x: Tensor,  # (T, I)
    lora_a: Tensor,  # and so on: the fields of Factors
    lora_b: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gate_logits: Tensor | None,
    weight: Tensor | None,  # (O, I), the frozen layer's; None: no frozen product
    base: Tensor | None,  # (O) its bias, or (T, O) the output of another layer
    save: bool,
    backend: str,  # its name, or "auto"
    *options: Any,  # the fields of Options
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x weight^T + base + delta. With `save` also logits (empty where given from outside) and u."""
    x = _rows(x)
    factors = Factors(_dense(lora_a), _dense(lora_b), _dense(gate_weight), _dense(gate_bias), _dense(gate_logits))
    problem = Problem(factors.sizes(x.shape[0]), x.dtype, x.device)
    name = dispatch.choose("lmoe" if weight is None else "lmoe_linear", problem, backend)
    with _no_autocast(x), _no_autograd():
        y, saved = dispatch.load(name).forward(x, factors, _rows(base), Options(*options), save=save)
        if weight is not None:
            y.addmm_(x, weight.t())  # [T, I] @ [I, O] -> [T, O]
    logits, u = (None, None) if saved is None else saved
    return y, x.new_empty(0) if logits is None else logits, x.new_empty(0) if u is None else u


def _backward(
    dy: Tensor,  # (T, O)
    dlogits: Tensor | None,  # (T, E), the gradient that arrives at the returned router logits
    x: Tensor | None,  # (T, I), needed by the weight gradients alone
    lora_a: Tensor,  # and so on: the fields of Factors
    lora_b: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gate_logits: Tensor | None,
    weight: Tensor | None,  # (O, I)
    logits: Tensor | None,  # (T, E), those that forward returned
    u: Tensor,  # (T, E, R) or (T, 1, R)
    wanted: list[bool],  # the fields of Wanted, and whether weight's is
    backend: str,
    *options: Any,  # the fields of Options
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted."""
    dy, x = _rows(dy), _rows(x)
    factors = Factors(_dense(lora_a), _dense(lora_b), _dense(gate_weight), _dense(gate_bias), _dense(gate_logits))
    problem = Problem(factors.sizes(dy.shape[0]), dy.dtype, dy.device)
    name = dispatch.choose("lmoe", problem, backend)
    with _no_autocast(dy), _no_autograd():
        grads: Gradients = dispatch.load(name).backward(
            dy, _dense(dlogits), x, factors, Saved(_dense(logits), u), Options(*options), wanted=Wanted(*wanted[:-1])
        )
        if grads.x is not None and weight is not None:
            grads.x.addmm_(dy, weight)  # [T, O] @ [O, I] -> [T, I]
        dweight = dy.t() @ x if wanted[-1] and x is not None else None  # [O, T] @ [T, I] -> [O, I]
    return *grads, dweight


def _forward_fake(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None,
    gate_logits: Tensor | None, weight: Tensor | None, base: Tensor | None, save: bool, *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, experts, wide = x.shape[0], lora_b.shape[0], torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(tokens, lora_b.shape[2])
    has_logits = save and gate_weight is not None
    logits = x.new_empty(tokens, experts, dtype=wide) if has_logits else x.new_empty(0)
    return y, logits, x.new_empty(tokens, *lora_a.shape[:2]) if save else x.new_empty(0)


def _backward_fake(
    dy: Tensor, dlogits: Tensor | None, x: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, gate_logits: Tensor | None, weight: Tensor | None, logits: Tensor | None, u: Tensor,
    wanted: list[bool], *rest: object,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    (tokens, out_features), in_features = dy.shape, lora_a.shape[2]
    dx, dweight = dy.new_empty(tokens, in_features), dy.new_empty(out_features, in_features)
    likes = (dx, lora_a, lora_b, gate_weight, gate_bias, gate_logits, dweight)
    return tuple(
        like.new_empty(like.shape) if asked and like is not None else None for like, asked in zip(likes, wanted, strict=True)
    )


def _rows(t: _MaybeTensor) -> _MaybeTensor:
    """Rows that a kernel can walk: the last dim contiguous, no two rows on the same memory."""
    if t is None or t.is_contiguous() or (t.dim() == 2 and t.stride(1) == 1 and t.stride(0) >= t.shape[1]):
        return t
    return t.contiguous()


def _dense(t: _MaybeTensor) -> _MaybeTensor:
    return t if t is None else t.contiguous()


def _no_autocast(x: Tensor) -> nullcontext | torch.autocast:
    """Inside an op the dtypes are settled: autocast, where it is on, must not touch the fp32 parts."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def _no_autograd() -> nullcontext | torch.no_grad:
    """Likewise gradients: off already, save where an op is called as it is, by an exported model say."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


_NOTHING = nullcontext()

for _key in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("forward", _forward, _key)
    _library.impl("backward", _backward, _key)
torch.library.register_fake("lmoe_kernels::forward", _forward_fake, lib=_library)
torch.library.register_fake("lmoe_kernels::backward", _backward_fake, lib=_library)
