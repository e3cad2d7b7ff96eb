# SPDX-License-Identifier: Apache-2.0
"""Dropout of rows: the mask of a token and a feature is a hash of both and a seed, so that no mask is stored.

The constants are those of Wellons' hash triple32. All backends compute the mask of `keep_mask` in
`lmoe_kernels.reference`.
"""

# pyright: reportGeneralTypeIssues=false
# A jit function that calls another sees it typed as never returning.

import struct
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.cost import ceil_div
from lmoe_kernels.backends.triton.tiles import let_next_kernel_start, wait_for_previous_kernel


def dropout(
    rows: Tensor,  # (T, F)
    seed: Tensor,  # (), int64
    probability: float,  # between 0 and 1, exclusive
) -> Tensor:
    """Rows (T, F) with dropout; see `lmoe_kernels.reference.dropout` for the contract."""
    T, F = rows.shape
    out = rows.new_empty(T, F)
    tile = configs.dropout_tile(F)
    factor_bits, threshold = _as_integers(probability, host.accumulator(rows))
    with host.on_device_of(rows):
        host.launch(
            _dropout_kernel, (tile.tiles_of(T), ceil_div(F, tile.F)),
            rows, rows.stride(0), seed, out, factor_bits, threshold, T, F, ACC=host.dot_constants(rows)["ACC"], tile=tile,
        )  # fmt: skip
    return out


@cache
def _as_integers(probability: float, accumulator: torch.dtype) -> tuple[int, int]:
    """The bits of 1 / (1 - probability) in that dtype, and of the smallest hash that is kept, as signed integers.

    Triton passes every float as fp32, and an integer from 2^31 on as one of 64 bits.
    """
    as_float, as_integer = ("<d", "<q") if accumulator == torch.float64 else ("<f", "<i")
    (factor_bits,) = struct.unpack(as_integer, struct.pack(as_float, 1 / (1 - probability)))
    (threshold,) = struct.unpack("<i", struct.pack("<I", int(probability * 2**32)))
    return factor_bits, threshold


@triton.jit(do_not_specialize=["factor_bits", "threshold", "T"])
def _dropout_kernel(
    rows_ptr, stride_t,  # (T, F)
    seed_ptr,  # (), int64
    out_ptr,  # (T, F), written
    factor_bits,  # see _as_integers
    threshold,  # likewise
    T,
    F,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of tokens and features."""
    wait_for_previous_kernel(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (t < T)[:, None] & (f < F)[None, :]
    rows = tl.load(rows_ptr + t.to(tl.int64)[:, None] * stride_t + f[None, :], mask=mask, other=0.0)
    keeps = _hash_of(tl.load(seed_ptr), t.to(tl.uint32), f.to(tl.uint32)) >= threshold.to(tl.uint32, bitcast=True)
    let_next_kernel_start(PDL)
    out = tl.where(keeps, rows.to(ACC) * factor_bits.to(ACC, bitcast=True), 0.0)
    tl.store(out_ptr + t.to(tl.int64)[:, None] * F + f[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hash_of(
    seed,  # int64
    t,  # (BLOCK_T) tokens, uint32
    f,  # (BLOCK_F) features, uint32
):
    """A hash of the seed for each token and feature (BLOCK_T, BLOCK_F); each token has a pair of keys."""
    first = _mixed(_mixed(seed.to(tl.uint32)) ^ t)
    second = _mixed(tl.add(_mixed((seed >> 32).to(tl.uint32) ^ 0x9E3779B9), t, sanitize_overflow=False))
    h = f[None, :] ^ first[:, None]
    h = _times(h ^ (h >> 17), 0xED5AD4BB)
    h = _times(h ^ (h >> 11) ^ second[:, None], 0xAC4C1B51)
    h = _times(h ^ (h >> 15), 0x31848BAB)
    return h ^ (h >> 14)


@triton.jit
def _mixed(h):
    """The bits of h mixed, so that close numbers get hashes that have nothing in common."""
    h = _times(h ^ (h >> 17), 0xED5AD4BB)
    h = _times(h ^ (h >> 11), 0xAC4C1B51)
    h = _times(h ^ (h >> 15), 0x31848BAB)
    return h ^ (h >> 14)


@triton.jit
def _times(h, factor: tl.constexpr):
    """The product modulo 2^32."""
    return tl.mul(h, factor, sanitize_overflow=False)  # pyright: ignore[reportArgumentType]
