# SPDX-License-Identifier: Apache-2.0
"""Why the `reference` backend cannot take a call, or does not by default."""

from lmoe_kernels.options import Problem


def why_not(problem: Problem) -> str | None:
    """None: it takes any call."""
    return None


def why_not_by_default(problem: Problem) -> str:
    """It is slow and large: it builds every token's factors."""
    return "only if selected by name"
