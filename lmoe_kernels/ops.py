"""The two operations as torch.library ops: what torch.compile, torch.export and the profiler see.

`lmoe_kernels::forward` and `lmoe_kernels::backward` are functional, return a fixed tuple of tensors, and alias none of their
inputs; a result that is not asked for is an empty tensor. They have no gradients of their own: these are `autograd`'s. Their
bodies hold what all backends share: rows made contiguous, autocast and autograd kept out, and the frozen product in the
delta-first order. The backend writes the (small) delta, and the frozen GEMM then adds into it with beta = 1, so that the
second half of that read-modify-write hides in a compute-bound GEMM and only the small term is rounded before the sum.
"""

from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from lmoe_kernels import dispatch

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)

_library = torch.library.Library("lmoe_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_library.define(
    "forward(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? gate_weight, Tensor? gate_logits, Tensor? weight,"
    " Tensor? base, float scaling, str mixing, int? top_k, bool renormalize, bool save, str backend)"
    " -> (Tensor y, Tensor logits, Tensor u)",
    tags=_TAGS,
)
_library.define(
    "backward(Tensor dy, Tensor? dlogits_in, Tensor? x, Tensor lora_a, Tensor lora_b, Tensor? gate_weight, Tensor logits,"
    " Tensor u, Tensor? weight, float scaling, str mixing, int? top_k, bool renormalize, bool[] output_mask, str backend)"
    " -> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dgate, Tensor dweight)",
    tags=_TAGS,
)
forward = torch.ops.lmoe_kernels.forward.default
backward = torch.ops.lmoe_kernels.backward.default


def _forward(
    x: Tensor,  # (T, I)
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    gate_logits: Tensor | None,  # (T, E)
    weight: Tensor | None,  # (O, I), the frozen layer's; None: no frozen product
    base: Tensor | None,  # (O) its bias, or (T, O) the output of another layer
    scaling: float,
    mixing: str,
    top_k: int | None,
    renormalize: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x weight^T + base + delta. With `save` also logits (empty where given from outside) and u."""
    x = _rows(x)
    with _no_autocast(x), _no_autograd():
        y, logits, u = dispatch.load(backend).forward(
            x, _dense(lora_a), _dense(lora_b), _dense(gate_weight), _dense(gate_logits), _rows(base),
            scaling, mixing, top_k, renormalize, save,
        )  # fmt: skip
        if weight is not None:
            y.addmm_(x, weight.t())  # [T, I] @ [I, O] -> [T, O]
    return y, x.new_empty(0) if logits is None else logits, x.new_empty(0) if u is None else u


def _backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I), needed by the weight gradients alone
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    logits: Tensor,  # (T, E)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    weight: Tensor | None,  # (O, I)
    scaling: float,
    mixing: str,
    top_k: int | None,
    renormalize: bool,
    output_mask: list[bool],  # x, lora_a, lora_b, gate_weight or the outside logits, weight
    backend: str,
) -> tuple[Tensor, ...]:
    """The gradients that `output_mask` asks for, the others empty."""
    dy, x = _rows(dy), _rows(x)
    with _no_autocast(dy), _no_autograd():
        grads = dispatch.load(backend).backward(
            dy, _dense(dlogits_in), x, _dense(lora_a), _dense(lora_b), _dense(gate_weight), _dense(logits), u,
            scaling, mixing, top_k, renormalize, tuple(output_mask[:4]),
        )  # fmt: skip
        if grads[0] is not None and weight is not None:
            grads[0].addmm_(dy, weight)  # [T, O] @ [O, I] -> [T, I]
        dweight = dy.t() @ x if output_mask[4] and x is not None else None  # [O, T] @ [T, I] -> [O, I]
    return tuple(dy.new_empty(0) if grad is None else grad for grad in (*grads, dweight))


def _forward_fake(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor | None, gate_logits: Tensor | None,
    weight: Tensor | None, base: Tensor | None, scaling: float, mixing: str, top_k: int | None, renormalize: bool,
    save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, experts, wide = x.shape[0], lora_b.shape[0], torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(tokens, lora_b.shape[2])
    has_logits = save and gate_weight is not None
    logits = x.new_empty(tokens, experts, dtype=wide) if has_logits else x.new_empty(0)
    return y, logits, x.new_empty(tokens, *lora_a.shape[:2]) if save else x.new_empty(0)


def _backward_fake(
    dy: Tensor, dlogits_in: Tensor | None, x: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor | None,
    logits: Tensor, u: Tensor, weight: Tensor | None, scaling: float, mixing: str, top_k: int | None,
    renormalize: bool, output_mask: list[bool], backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    (tokens, out_features), in_features = dy.shape, lora_a.shape[2]
    dx, dweight = dy.new_empty(tokens, in_features), dy.new_empty(out_features, in_features)
    likes = (dx, lora_a, lora_b, logits if gate_weight is None else gate_weight, dweight)
    return tuple(
        like.new_empty(like.shape) if asked else dy.new_empty(0) for like, asked in zip(likes, output_mask, strict=True)
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
