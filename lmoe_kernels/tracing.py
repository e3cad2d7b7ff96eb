# SPDX-License-Identifier: Apache-2.0
"""What torch.compile needs to be told about functions that it calls while it traces."""

from collections.abc import Callable


def constant_when_traced(function: Callable[..., object]) -> None:
    """Let torch.compile call a function of constants while it traces, and keep the result as a constant.

    `torch.compiler.assume_constant_result` does the same, but imports torch._dynamo and Triton at once.
    """
    function.__dict__["_dynamo_marked_constant"] = True
