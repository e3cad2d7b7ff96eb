# SPDX-License-Identifier: Apache-2.0
"""Hand-written CUDA kernels (csrc/) behind a torch-free extension: lowest launch cost, made for few tokens."""
