"""Forward of the `cuda` backend: fills in the parameters of csrc/params.h and launches.

Every tensor whose address is passed stays referenced until the launcher returns; the caching allocator then keeps its memory
in the order of the stream.
"""

from typing import Any

import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.configs import decode_plan, padded


def forward(
    x: Tensor,  # (T, I)
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    gate_logits: Tensor | None,  # (T, E)
    base: Tensor | None,  # (O) or (T, O)
    scaling: float,
    mixing: str,
    top_k: int | None,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The delta, added to `base`; see `lmoe_kernels.reference.forward` for the contract."""
    tokens, in_features = x.shape
    experts, rank, out_features = lora_b.shape
    experts_of_a, has_gate = lora_a.shape[0], gate_logits is None
    library = extension.library()
    device, stream = extension.queue(x)
    plan = decode_plan(
        tokens, in_features, out_features, experts, experts_of_a, rank, has_gate, x.element_size(),
        extension.processors(device),
    )  # fmt: skip
    y = x.new_empty(tokens, out_features)
    u = logits = None
    if save or plan is None:
        u = x.new_empty(tokens, experts_of_a, rank)
        logits = x.new_empty(tokens, experts, dtype=torch.float32) if has_gate else None

    params = library.ForwardParams() if plan is None else library.DecodeParams()
    set_problem(params, x, lora_a, lora_b, gate_weight, gate_logits if logits is None else logits, u, scaling, mixing, top_k)
    if base is not None:
        params.base = base.data_ptr()
        params.base_stride = base.stride(0) if base.dim() == 2 else 0
    params.T, params.dtype, params.y = tokens, extension.DTYPES[x.dtype], y.data_ptr()
    if plan is None:
        v = x.new_empty(tokens, padded(experts * rank))
        scratch = x.new_empty(tokens, experts, dtype=torch.float32)
        set_workspaces(params, v, scratch)
        library.forward(params, device, stream)
    else:
        partial = x.new_empty(plan.chunks, tokens, experts_of_a * rank + experts, dtype=torch.float32)
        params.partial = partial.data_ptr()
        params.blocks, params.chunk, params.chunks = plan.blocks, plan.chunk, plan.chunks
        params.column_tile, params.smem = plan.column_tile, plan.smem
        library.decode(params, device, stream)
    return (y, logits, u) if save else (y, None, None)


def set_problem(
    params: Any,  # ForwardParams, BackwardParams or DecodeParams
    x: Tensor | None,  # (T, I)
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    logits: Tensor | None,  # (T, E)
    u: Tensor | None,  # (T, E, R) or (T, 1, R)
    scaling: float,
    mixing: str,
    top_k: int | None,
) -> None:
    """Fill in what forward and backward have in common."""
    params.experts_of_a, params.R, params.I = lora_a.shape
    params.E, _, params.O = lora_b.shape
    params.top_k = params.E if top_k is None else top_k
    params.scaling = scaling
    params.factors = mixing == "factors"
    if x is not None:
        params.x = x.data_ptr()
        params.x_stride = x.stride(0)
    params.lora_a = lora_a.data_ptr()
    params.lora_a_fp32 = lora_a.dtype is torch.float32
    params.lora_b = lora_b.data_ptr()
    params.lora_b_fp32 = lora_b.dtype is torch.float32
    if gate_weight is not None:
        params.gate_weight = gate_weight.data_ptr()
        params.gate_weight_fp32 = gate_weight.dtype is torch.float32
    if logits is not None:
        params.logits = logits.data_ptr()
    params.logits_fp32 = logits is None or logits.dtype is torch.float32
    if u is not None:
        params.u = u.data_ptr()


def set_workspaces(
    params: Any,  # ForwardParams or BackwardParams
    v: Tensor,  # (T, padded(E R))
    scratch: Tensor,  # (T, ...) fp32
) -> None:
    """Fill in the workspaces that forward and backward have in common."""
    params.v = v.data_ptr()
    params.v_stride = v.stride(0)
    params.scratch = scratch.data_ptr()
    params.scratch_stride = scratch.stride(0)
