"""Forward of the `cuda` backend: fills in the parameters of csrc/params.h and launches.

Every tensor whose address is passed stays referenced until the launcher returns; the caching allocator then keeps its memory
in the order of the stream.
"""

from typing import Any

import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.configs import padded


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
    tokens = x.shape[0]
    experts, rank, out_features = lora_b.shape
    y = x.new_empty(tokens, out_features)
    u = x.new_empty(tokens, lora_a.shape[0], rank)
    logits = x.new_empty(tokens, experts, dtype=torch.float32) if gate_logits is None else gate_logits
    v = x.new_empty(tokens, padded(experts * rank))
    scratch = x.new_empty(tokens, experts, dtype=torch.float32)

    library = extension.library()
    params = library.ForwardParams()
    set_problem(params, x, lora_a, lora_b, gate_weight, logits, u, v, scratch, scaling, mixing, top_k)
    if base is not None:
        params.base = base.data_ptr()
        params.base_stride = base.stride(0) if base.dim() == 2 else 0
    params.y = y.data_ptr()
    library.forward(params, *extension.queue(x))
    if not save:
        return y, None, None
    return y, logits if gate_logits is None else None, u


def set_problem(
    params: Any,  # ForwardParams, BackwardParams or DecodeParams
    x: Tensor | None,  # (T, I)
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    logits: Tensor,  # (T, E)
    u: Tensor,  # (T, E, R) or (T, 1, R)
    v: Tensor,  # (T, padded(E R)), workspace
    scratch: Tensor,  # (T, ...) fp32, workspace
    scaling: float,
    mixing: str,
    top_k: int | None,
) -> None:
    """Fill in what forward and backward have in common."""
    params.T, params.E = logits.shape
    params.experts_of_a, params.R, params.I = lora_a.shape
    params.O = lora_b.shape[2]
    params.dtype = extension.DTYPES[u.dtype]
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
    params.logits = logits.data_ptr()
    params.logits_fp32 = logits.dtype is torch.float32
    params.u = u.data_ptr()
    params.v = v.data_ptr()
    params.v_stride = v.stride(0)
    params.scratch = scratch.data_ptr()
    params.scratch_stride = scratch.stride(0)
