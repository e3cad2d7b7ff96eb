# SPDX-License-Identifier: Apache-2.0
"""Forward of the `reference` backend."""

from lmoe_kernels.reference import forward

__all__ = ["forward"]
