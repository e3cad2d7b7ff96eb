# SPDX-License-Identifier: Apache-2.0
"""Backward of the `cuda` backend: allocates gradients and workspaces; one call of the launcher computes nearly all of it."""

import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.configs import expand_groups, padded, shrink_parts, wgrad_splits
from lmoe_kernels.casting import from_buffer
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
    sizes, has_gate = factors.sizes(dy.shape[0]), factors.gate_logits is None
    T, I, O, E, R, experts_of_a = sizes  # noqa: E741
    grads = _allocate(dy, I, factors, wanted)
    if T == 0:
        return grads

    du_columns, dlogits_columns = experts_of_a * R, E if has_gate else 0
    v = dy.new_empty(T, padded(E * R))
    du_dlogits = None
    if wanted.x or wanted.lora_a or wanted.gate:
        du_dlogits = dy.new_empty(T, padded(du_columns + dlogits_columns))
    device, stream = extension.queue(dy)
    processors, element_size = extension.device_of(device).processors, dy.element_size()
    parts = shrink_parts(T, E * R, O, element_size, processors)
    x_splits = wgrad_splits(T, du_columns + dlogits_columns, I, element_size, processors)
    dy_splits = wgrad_splits(T, E * R, O, element_size, processors)
    over_x, over_dy = x_splits * (du_columns + dlogits_columns) * I, dy_splits * E * R * O
    partial = dy.new_empty(
        max(parts * T * E * R, over_x if x_splits > 1 else 0, over_dy if dy_splits > 1 else 0), dtype=torch.float32
    )
    dlogits_in = None if dlogits_in is None else dlogits_in.float()

    library = extension.library()
    params = library.BackwardParams(extension.DTYPES[dy.dtype], sizes)
    params.set_problem(options, from_buffer(factors, dy.dtype, saved.cast), x, None, saved.logits, saved.u, None)
    params.set_workspaces(v, partial, parts, expand_groups(T, I, processors))
    params.set_backward(dy, dlogits_in, du_dlogits, x_splits, dy_splits, grads)
    library.backward(params, device, stream)
    if grads.gate_bias is not None and du_dlogits is not None:
        dlogits = du_dlogits[:, du_columns : du_columns + E]
        grads.gate_bias.copy_(dlogits.sum(dim=0, dtype=torch.float32))
    return grads


def _allocate(dy: Tensor, in_features: int, factors: Factors, wanted: Wanted) -> Gradients:
    """Memory for the gradients that are wanted: zeros where there are no tokens, since no kernel runs then."""
    tokens = dy.shape[0]
    new = torch.zeros_like if tokens == 0 else torch.empty_like
    dx = dy.new_empty(tokens, in_features) if wanted.x else None
    pairs = zip(factors, wanted[1:], strict=True)
    return Gradients(dx, *[new(factor) if asked and factor is not None else None for factor, asked in pairs])
