"""Backward of the `cuda` backend: workspaces, results, one call of the launcher for all of it."""

import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.configs import padded, shrink_parts, wgrad_splits
from lmoe_kernels.backends.cuda.forward import set_problem
from lmoe_kernels.options import Factors, Gradients, Options, Saved, Wanted


def backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I)
    factors: Factors,
    saved: Saved,
    options: Options,
    *,
    wanted: Wanted,
) -> Gradients:
    """The gradients that are wanted; see `lmoe_kernels.reference.backward` for the contract."""
    lora_a, lora_b, gate_weight, _, _ = factors
    logits, u = saved.router_logits(factors), saved.u
    scaling, mixing, top_k, renormalize = options
    output_mask = wanted.x, wanted.lora_a, wanted.lora_b, wanted.gate
    tokens, out_features = dy.shape
    experts, rank, _ = lora_b.shape
    in_features = lora_a.shape[2]
    want_x, want_a, want_b, want_gate = output_mask
    new = torch.zeros_like if tokens == 0 else torch.empty_like  # without tokens no kernel runs
    dx = dy.new_empty(tokens, in_features) if want_x else None
    dlora_a = new(lora_a) if want_a else None
    dlora_b = new(lora_b) if want_b else None
    dgate = new(logits if gate_weight is None else gate_weight) if want_gate else None
    if tokens == 0:
        return _gradients(factors, dx, dlora_a, dlora_b, dgate)

    rank_columns = lora_a.shape[0] * rank
    gate_columns = 0 if gate_weight is None else experts
    v = dy.new_empty(tokens, padded(experts * rank))
    scratch = dy.new_empty(tokens, 2 * (experts + rank), dtype=torch.float32)
    dv = torch.empty_like(v)
    z = dy.new_empty(tokens, padded(rank_columns + gate_columns))
    device, stream = extension.queue(dy)
    parts = shrink_parts(tokens, out_features, extension.processors(device))
    splits = wgrad_splits(tokens, experts * rank, min(in_features, out_features))
    largest = max((rank_columns + gate_columns) * in_features, experts * rank * out_features)
    sums = max(parts * tokens * experts * rank if parts > 1 else 0, splits * largest if splits > 1 else 0)
    partial = dy.new_empty(sums, dtype=torch.float32)

    library = extension.library()
    params = library.BackwardParams()
    set_problem(
        params, x, lora_a, lora_b, gate_weight, logits, None, u, dy, tokens, scaling, mixing, top_k, renormalize
    )  # fmt: skip
    params.set_workspaces(v.data_ptr(), v.stride(0), scratch.data_ptr(), scratch.stride(0), partial.data_ptr(), parts)
    params.dy = dy.data_ptr()
    params.dy_stride = dy.stride(0)
    if dlogits_in is not None:
        dlogits_in = dlogits_in.float()
        params.dlogits_in = dlogits_in.data_ptr()
    if want_x or want_a or want_gate:
        params.dv, params.z = dv.data_ptr(), z.data_ptr()
    params.z_stride = z.stride(0)
    params.wgrad_splits = splits
    for name, grad in (
        ("dx", dx),
        ("dlora_a", dlora_a),
        ("dlora_b", dlora_b),
        ("dlogits" if gate_weight is None else "dgate_weight", dgate),
    ):
        if grad is not None:
            setattr(params, name, grad.data_ptr())
    library.backward(params, device, stream)
    return _gradients(factors, dx, dlora_a, dlora_b, dgate)


def _gradients(factors: Factors, dx: Tensor | None, da: Tensor | None, db: Tensor | None, dgate: Tensor | None) -> Gradients:
    return Gradients(dx, da, db, None, None, dgate) if factors.gate_weight is None else Gradients(dx, da, db, dgate)
