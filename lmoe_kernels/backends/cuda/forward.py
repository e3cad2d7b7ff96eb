"""Forward of the `cuda` backend: fills in the parameters of csrc/params.h and launches.

Every tensor whose address is passed stays referenced until the launcher returns; the caching allocator then keeps its memory
in the order of the stream.
"""

from typing import Any

import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.configs import decode_plan, one_pass_smem, padded, shrink_parts
from lmoe_kernels.options import Factors, Options, Saved


def forward(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """The delta, added to `base`; see `lmoe_kernels.reference.forward` for the contract."""
    lora_a, lora_b, gate_weight, _, gate_logits = factors
    scaling, mixing, top_k, renormalize = options
    tokens, in_features = x.shape
    experts, rank, out_features = lora_b.shape
    experts_of_a, has_gate = lora_a.shape[0], gate_logits is None
    library = extension.library()
    device, stream = extension.queue(x)
    size, processors = x.element_size(), extension.processors(device)
    plan = decode_plan(tokens, in_features, out_features, experts, experts_of_a, rank, has_gate, size, processors)
    smem = 0 if plan is not None else one_pass_smem(tokens, experts, rank, size, processors)
    by_stages = plan is None and smem == 0
    y = x.new_empty(tokens, out_features)
    u = logits = None
    if save or by_stages:
        u = x.new_empty(tokens, experts_of_a, rank)
        logits = x.new_empty(tokens, experts, dtype=torch.float32) if has_gate else None

    params = library.ForwardParams() if plan is None else library.DecodeParams()
    router = logits if has_gate else gate_logits
    set_problem(params, x, lora_a, lora_b, gate_weight, router, base, u, y, tokens, scaling, mixing, top_k, renormalize)
    rows = experts_of_a * rank + (experts if has_gate else 0)
    if plan is not None:
        partial = x.new_empty(plan.chunks, tokens, rows, dtype=torch.float32)
        params.set_plan(partial.data_ptr(), plan.blocks, plan.chunk, plan.chunks, plan.column_tile, plan.smem)
        library.decode(params, device, stream)
        return y, Saved(logits, u) if save and u is not None else None
    params.smem = smem
    if by_stages:
        parts = shrink_parts(tokens, in_features, processors)
        v = x.new_empty(tokens, padded(experts * rank))
        scratch = x.new_empty(tokens, experts, dtype=torch.float32)
        partial = x.new_empty(parts if parts > 1 else 0, tokens, rows, dtype=torch.float32)
        params.set_workspaces(v.data_ptr(), v.stride(0), scratch.data_ptr(), scratch.stride(0), partial.data_ptr(), parts)
    library.forward(params, device, stream)
    return y, Saved(logits, u) if save and u is not None else None


def set_problem(
    params: Any,  # ForwardParams, BackwardParams or DecodeParams
    x: Tensor | None,  # (T, I)
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    logits: Tensor | None,  # (T, E)
    base: Tensor | None,  # (O) or (T, O)
    u: Tensor | None,  # (T, E, R) or (T, 1, R)
    like: Tensor,  # (T, O), y, or dy, whose dtype is x's
    tokens: int,
    scaling: float,
    mixing: str,
    top_k: int | None,
    renormalize: bool,
) -> None:
    """Fill in what forward and backward have in common, in the order of `set_problem` in csrc/bindings.cpp."""
    fp32 = torch.float32
    experts_of_a, rank, in_features = lora_a.shape
    experts, _, out_features = lora_b.shape
    kept = experts if top_k is None else top_k
    # a gate without features has no memory, and null would say that the logits come from outside
    gate = 0 if gate_weight is None else gate_weight.data_ptr() or 16
    params.set_problem(
        extension.DTYPES[like.dtype],
        tokens, in_features, out_features, experts, rank, experts_of_a, kept, renormalize or kept == experts,
        scaling, mixing == "factors",
        *((0, 0) if x is None else (x.data_ptr(), x.stride(0))),
        lora_a.data_ptr(), lora_a.dtype is fp32,
        lora_b.data_ptr(), lora_b.dtype is fp32,
        gate, gate_weight is not None and gate_weight.dtype is fp32,
        *((0, True) if logits is None else (logits.data_ptr(), logits.dtype is fp32)),
        *((0, 0) if base is None else (base.data_ptr(), base.stride(0) if base.dim() == 2 else 0)),
        0 if u is None else u.data_ptr(),
        like.data_ptr(),
    )  # fmt: skip
