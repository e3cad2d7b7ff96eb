# SPDX-License-Identifier: Apache-2.0
"""Backward of the `reference` backend."""

from lmoe_kernels.reference import backward

__all__ = ["backward"]
