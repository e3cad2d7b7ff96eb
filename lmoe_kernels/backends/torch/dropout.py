# SPDX-License-Identifier: Apache-2.0
"""Dropout of the `torch` backend: the mask of `lmoe_kernels.reference.keep_mask`, in int32 and in place.

int32 has the products and sums of uint32, bit for bit. Only a shift to the right must clear the bits that repeat the sign.
"""

import torch
from torch import Tensor

_BLOCK = 1 << 16  # elements of one block of rows: its hashes stay in the caches through all steps


def dropout(rows: Tensor, seed: Tensor, probability: float) -> Tensor:
    """Rows (T, F) with dropout; see `lmoe_kernels.reference.dropout` for the contract."""
    tokens, features = rows.shape
    result = torch.empty((tokens, features), dtype=rows.dtype, device=rows.device)
    scale = torch.tensor(1.0 / (1.0 - probability), dtype=torch.promote_types(rows.dtype, torch.float32)).item()
    dropped_below = _int32(int(probability * 2**32) ^ _SIGN)
    first, second = _keys(seed, tokens)
    feature = torch.arange(features, dtype=torch.int32, device=rows.device)
    block = tokens if rows.is_cuda else max(1, _BLOCK // max(1, features))
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        hashed = _hash(feature ^ first[part, None], second[part, None])
        torch.mul(rows[part], scale, out=result[part])
        result[part].masked_fill_((hashed ^ _int32(_SIGN)) < dropped_below, 0.0)
    return result


def _keys(seed: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The two keys (T) of every token."""
    token = torch.arange(tokens, dtype=torch.int32, device=seed.device)
    low, high = seed.view(1).view(torch.int32)  # little endian
    return _hash(_hash(low.clone()) ^ token), _hash(_hash(high ^ _int32(0x9E3779B9)) + token)


def _hash(h: Tensor, key: Tensor | int = 0) -> Tensor:
    """The hash of `reference.keep_mask`, in place."""
    h ^= (h >> 17) & 0x7FFF
    h *= _int32(0xED5AD4BB)
    h ^= (h >> 11) & 0x1FFFFF
    h ^= key
    h *= _int32(0xAC4C1B51)
    h ^= (h >> 15) & 0x1FFFF
    h *= _int32(0x31848BAB)
    h ^= (h >> 14) & 0x3FFFF
    return h


def _int32(number: int) -> int:
    """The number in the range of int32 that has the same 32 bits."""
    return number - (1 << 32) if number >= 1 << 31 else number


_SIGN = 1 << 31  # the order of two numbers as uint32 is the order of int32 with this bit flipped in both
