# SPDX-License-Identifier: Apache-2.0
"""Dropout of rows in the `cuda` backend: one kernel, which computes the mask from a seed."""

from torch import Tensor

from lmoe_kernels.backends.cuda import extension


def dropout(
    rows: Tensor,  # (T, F)
    seed: Tensor,  # (), int64
    probability: float,  # between 0 and 1, exclusive
) -> Tensor:
    """Rows (T, F) with dropout; see `lmoe_kernels.reference.dropout` for the contract."""
    library = extension.library()
    out = rows.new_empty(rows.shape)
    params = library.DropoutParams(extension.DTYPES[rows.dtype], rows.shape, rows, seed, probability, out)
    library.dropout(params, *extension.queue(rows))
    return out
