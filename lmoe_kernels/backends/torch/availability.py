# SPDX-License-Identifier: Apache-2.0
"""Why the `torch` backend cannot take a call, or does not by default: it always can, and does."""

from lmoe_kernels.options import Problem


def why_not(problem: Problem) -> str | None:
    """None: it takes any call."""
    return None


def why_not_by_default(problem: Problem) -> str | None:
    """None: it is the last backend that the automatic choice asks."""
    return None
