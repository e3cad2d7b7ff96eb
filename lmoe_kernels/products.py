# SPDX-License-Identifier: Apache-2.0
"""Matrix products on ATen whose results keep the precision of the accumulators."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_wide(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix^T` as the accumulators hold it: fp32 for half-precision operands, unrounded."""
    if rows.dtype.itemsize > 2:
        return F.linear(rows, matrix)
    if rows.is_cuda:
        return torch.mm(rows, matrix.t(), out_dtype=torch.float32)
    return F.linear(rows.float(), matrix.float())  # ATen's CPU products round their result to the operands' dtype


def weight_gradient(coefficients: Tensor, rows: Tensor, parameter: Tensor) -> Tensor:
    """coefficients^T rows: (T, C) and (T, F) to the parameter's shape, in its dtype, out of the accumulators."""
    grad = rows_gradient(coefficients, rows, parameter.dtype)
    return grad if parameter.dim() == 2 else grad.view(parameter.shape)


def rows_gradient(coefficients: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """coefficients^T rows: (T, C) and (T, F) to (C, F), in this dtype, out of the accumulators."""
    left = coefficients.t()  # [C, T] @ [T, F] -> [C, F]
    return torch.mm(left, rows) if dtype == rows.dtype else linear_wide(left, rows.t()).to(dtype)
