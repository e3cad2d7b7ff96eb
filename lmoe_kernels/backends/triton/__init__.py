# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels: NVIDIA and AMD GPUs, and, in tests, the CPU through Triton's interpreter."""
