# SPDX-License-Identifier: Apache-2.0
"""Implementations of the operation, one folder each: the same two functions, `forward` and `backward`, in the same files.

Their signatures, argument by argument, are those of `lmoe_kernels.reference`. What `ops` promises to each: shapes and dtypes
checked, all tensors on one device, rows of x, dy and base with a contiguous last dim, everything else contiguous,
autocast off.
"""
