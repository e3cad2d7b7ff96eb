"""The factored form on ATen's matrix products: runs anywhere, the portable default."""
