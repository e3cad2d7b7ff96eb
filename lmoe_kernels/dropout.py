# SPDX-License-Identifier: Apache-2.0
"""Dropout on the rows of x that A sees, around the forward and the backward of any backend. The gate sees x itself.

Two different matrices then meet A and the gate, so the router logits are computed here, and the backend gets them like those
of an outside router. No mask is stored: it is a function of a seed, the token and the feature (`reference.keep_mask`), and
the backward computes it again. Every backend has a function `dropout` that applies it in one pass over the rows.
"""

from functools import partial

import torch
from torch import Tensor

from lmoe_kernels.dispatch import Functions
from lmoe_kernels.options import Factors, Gradients, Options, Saved, Wanted
from lmoe_kernels.products import linear_wide, weight_gradient


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed from PyTorch's generator of the device, whose state activation checkpointing restores."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)


def around(functions: Functions, seed: Tensor) -> Functions:
    """The functions of a backend with dropout around its forward and its backward, whose signatures stay."""
    return functions._replace(forward=partial(_forward, functions, seed), backward=partial(_backward, functions, seed))


def with_outside_logits(factors: Factors, logits: Tensor | None) -> Factors:
    """The factors that the backend gets: without the gate's parameters, with the logits if the gate has computed them."""
    if logits is None:
        return factors
    return factors._replace(gate_weight=None, gate_bias=None, gate_logits=logits)


def _forward(
    functions: Functions,
    seed: Tensor,  # (), int64
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    logits = None
    if factors.gate_weight is not None:
        logits = linear_wide(x, factors.gate_weight.to(x.dtype))  # [T, I] @ [I, E] -> [T, E]
        if factors.gate_bias is not None:
            logits += factors.gate_bias
    dropped = functions.dropout(x, seed, options.dropout)
    y, saved = functions.forward(dropped, with_outside_logits(factors, logits), base, options, save=save)
    return y, None if saved is None else saved._replace(logits=logits)


def _backward(
    functions: Functions,
    seed: Tensor,  # (), int64
    dy: Tensor,  # (T, O)
    dlogits: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I)
    factors: Factors,
    saved: Saved,
    options: Options,
    *,
    wanted: Wanted,
) -> Gradients:
    gate_weight, gate_bias = factors.gate_weight, factors.gate_bias
    through_gate = gate_weight is not None and (wanted.x or wanted.gate_weight or wanted.gate_bias)
    dropped = None
    if wanted.lora_a:
        assert x is not None
        dropped = functions.dropout(x, seed, options.dropout)
    grads: Gradients = functions.backward(
        dy,
        dlogits,
        dropped,
        with_outside_logits(factors, saved.logits),
        saved._replace(logits=None),
        options,
        wanted=wanted._replace(gate_weight=False, gate_bias=False, gate_logits=wanted.gate_logits or through_gate),
    )
    dx = None if grads.x is None else functions.dropout(grads.x, seed, options.dropout)
    if gate_weight is None:
        return grads._replace(x=dx)
    of_logits, dgate_weight, dgate_bias = grads.gate_logits, None, None
    if of_logits is not None:
        rounded = of_logits.to(dy.dtype)
        if dx is not None:
            dx.addmm_(rounded, gate_weight.to(dy.dtype))  # [T, E] @ [E, I] -> [T, I]
        if wanted.gate_weight:
            assert x is not None
            dgate_weight = weight_gradient(rounded, x, gate_weight)
        if wanted.gate_bias:
            assert gate_bias is not None
            dgate_bias = of_logits.sum(dim=0).to(gate_bias.dtype)
    return grads._replace(x=dx, gate_weight=dgate_weight, gate_bias=dgate_bias, gate_logits=None)
