# SPDX-License-Identifier: Apache-2.0
"""Serving with the `reference` backend."""

from lmoe_kernels.reference import add_stacked

__all__ = ["add_stacked"]
