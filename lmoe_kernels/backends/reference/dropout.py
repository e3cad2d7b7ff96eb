# SPDX-License-Identifier: Apache-2.0
"""Dropout of the reference, under the name that every backend has."""

from lmoe_kernels.reference import dropout

__all__ = ["dropout"]
