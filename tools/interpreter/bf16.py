"""Triton's interpreter with bf16 arithmetic as on hardware.

Triton 3.6 and 3.7 interpret bf16 numbers as their uint16 bit patterns: dots and sums silently return garbage, and fp32 is
truncated to bf16 where hardware rounds to nearest even. `install` replaces these builders of the interpreter; it is for
tests and must run before the first kernel.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np


def interpret() -> None:
    """Make `triton.jit` return kernels that run on CPU tensors. To be called before Triton is first imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    install()


def install() -> None:
    """Replace the interpreter's bf16."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    handle = interpreter.TensorHandle

    def widened(value: Any) -> Any:
        return handle(bf16_to_fp32(value.data), tl.float32) if value.dtype.scalar == tl.bfloat16 else value

    def wrap(name: str) -> Callable[[Callable], None]:
        replaced = getattr(builder, name)

        def put(replacement: Callable) -> None:
            setattr(builder, name, lambda self, *args: replacement(replaced, self, *args))

        return put

    @wrap("create_dot")
    def _(replaced: Callable, self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return replaced(self, widened(a), widened(b), *rest)

    @wrap("binary_op")
    def _(replaced: Callable, self: Any, left: Any, right: Any, op: Callable) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return replaced(self, left, right, op)
        result = op(widened(left).data, widened(right).data)
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(fp32_to_bf16(result), tl.bfloat16)

    @wrap("cast_impl")
    def _(replaced: Callable, self: Any, value: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and value.dtype.scalar == tl.float32:
            return handle(fp32_to_bf16(value.data), tl.bfloat16)
        if tl.bfloat16 in (to.scalar, value.dtype.scalar) and value.dtype.scalar != to.scalar:  # through fp32
            return replaced(self, replaced(self, value, tl.float32), to) if to.scalar != tl.float32 else widened(value)
        return replaced(self, value, to)

    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: handle(fp32_to_bf16(np.array([value], np.float32)), tl.bfloat16)
    # after a launch Triton copies every storage back to its device, which here would be onto itself
    executor._restore_args_dev = lambda self, *args: None
    _make_index(interpreter)


def _make_index(interpreter: Any) -> None:
    """`range` over a tensor calls int() on an array of one element, which numpy 2.4 refuses (Triton 3.6)."""
    replaced = interpreter._patch_lang_tensor

    def patch(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        result = replaced(tensor, *args, **kwargs)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return result

    interpreter._patch_lang_tensor = patch


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The numbers that bf16 bit patterns stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """bf16 bit patterns, rounded to nearest even."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)
