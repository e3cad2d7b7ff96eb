# SPDX-License-Identifier: Apache-2.0
"""A, B and gate_weight in the dtype of x, for factors that are kept in fp32 next to half-precision activations.

The forward makes one buffer of all copies, written by one kernel, and saves it, so that the backward does not cast again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmoe_kernels.options import Factors

_ALIGNED = 64  # elements: each copy begins at an address that the widest loads and TMA accept


class CastFactors(NamedTuple):
    """The factors with A, B and gate_weight in the dtype of x."""

    factors: Factors
    buffer: Tensor | None  # the memory of the copies; None if there are none


def cast_factors(factors: Factors, dtype: torch.dtype) -> CastFactors:
    """Cast those of A, B and gate_weight that have another dtype, all in one kernel."""
    names = _to_cast(factors, dtype)
    if not names:
        return CastFactors(factors, None)
    buffer = factors.lora_a.new_empty(cast_size(factors, dtype), dtype=dtype)
    copies = _copies(factors, names, buffer)
    torch._foreach_copy_(list(copies.values()), [getattr(factors, name) for name in names])
    return CastFactors(factors._replace(**copies), buffer)


def from_buffer(factors: Factors, dtype: torch.dtype, buffer: Tensor | None) -> Factors:
    """The factors that `cast_factors` returned with this buffer."""
    if buffer is None:
        return factors
    return factors._replace(**_copies(factors, _to_cast(factors, dtype), buffer))


def cast_size(factors: Factors, dtype: torch.dtype) -> int:
    """Elements of the buffer, 0 if nothing is to be cast."""
    return sum(_padded(getattr(factors, name)) for name in _to_cast(factors, dtype))


def _to_cast(factors: Factors, dtype: torch.dtype) -> list[str]:
    """The fields to cast. A bias and outside logits are not: they are added or read in fp32."""
    lora_a, lora_b, gate_weight, _, _ = factors
    if lora_a.dtype == lora_b.dtype == dtype and (gate_weight is None or gate_weight.dtype == dtype):
        return []
    named = (("lora_a", lora_a), ("lora_b", lora_b), ("gate_weight", gate_weight))
    return [name for name, factor in named if factor is not None and factor.dtype != dtype]


def _copies(factors: Factors, names: list[str], buffer: Tensor) -> dict[str, Tensor]:
    """Views of the buffer with the shapes of the factors, one after another."""
    copies, start = {}, 0
    for name in names:
        factor: Tensor = getattr(factors, name)
        copies[name] = buffer[start : start + factor.numel()].view(factor.shape)
        start += _padded(factor)
    return copies


def _padded(factor: Tensor) -> int:
    return -(-factor.numel() // _ALIGNED) * _ALIGNED
