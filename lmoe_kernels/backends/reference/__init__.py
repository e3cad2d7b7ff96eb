# SPDX-License-Identifier: Apache-2.0
"""The literal definition, `lmoe_kernels.reference`, as a backend: the truth that the others are tested against."""
