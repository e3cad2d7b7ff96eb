# SPDX-License-Identifier: Apache-2.0
"""placeholder until merge"""

from lmoe_kernels.reference import dropout

__all__ = ["dropout"]
