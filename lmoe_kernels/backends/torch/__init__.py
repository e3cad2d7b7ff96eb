# SPDX-License-Identifier: Apache-2.0
"""The factored form on ATen's matrix products: runs anywhere, the portable default."""
