# SPDX-License-Identifier: Apache-2.0
"""The checks of user input. Every error names the operation, the argument, what it must be, and what was given.

The checks read the shapes, dtypes and devices of tensors, never their values, so no check waits for a GPU.
"""

import math
import sys
from numbers import Real
from typing import Any, NoReturn, TypeGuard, cast, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from lmoe_kernels.options import Factors, Mixing, Options

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXINGS = get_args(Mixing)
_ONE_OF = "exactly one of gate_weight, gate_logits and gates"
_LARGEST = sys.float_info.max
_PLAIN = frozenset((Tensor, Parameter))


def fail(op: str, argument: str, must: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise an error in the format that all errors of this package have: one line."""
    raise error(f"{op}: {argument} must {must}, got {got}")


def check_call(op: str, x: Tensor, factors: Factors, options: Options) -> None:
    """Check the arguments that `lmoe` and `lmoe_linear` share.

    Raises:
        ValueError: a shape, a device or an option does not fit.
        TypeError: a type, a layout or a dtype is not supported.
    """
    if not _fits(x, factors):
        _check_factors(op, x, factors, "gate_logits" if options.softmax else "gates")
    check_options(op, factors.lora_b.shape[0], options)


def _fits(x: Tensor, factors: Factors) -> bool:
    """Whether these are plain tensors, with a gate_weight alone, that pass every check of `_check_factors`.

    The usual call needs no more. It reads each attribute once and takes 15 us instead of 45 us while weights stream through
    the caches between calls (Intel Xeon, 2 cores, 2026-11-26).
    """
    lora_a, lora_b, gate_weight, gate_bias, gate_logits = factors
    if gate_weight is None or gate_bias is not None or gate_logits is not None or not is_plain(x) or x.dtype not in DTYPES:
        return False
    dtype, device = x.dtype, x.device
    for factor in (lora_a, lora_b, gate_weight):
        if not is_plain(factor) or factor.device != device or factor.dtype not in (dtype, torch.float32):
            return False
    of_x, of_b = x.shape, lora_b.shape
    if not of_x or len(of_b) != 3:
        return False
    (experts, rank, _), in_features = of_b, of_x[-1]
    return (
        experts >= 1
        and rank >= 1
        and gate_weight.shape == (experts, in_features)
        and lora_a.shape in ((experts, rank, in_features), (1, rank, in_features))
    )


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether this is a strided tensor of PyTorch's own classes."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_nested


def _check_factors(op: str, x: Tensor, factors: Factors, outside: str = "gate_logits") -> None:
    """Check x and the factors one by one, each for all that may be wrong with it. `outside` is what gate_logits hold."""
    lora_a, lora_b, gate_weight, gate_bias, gate_logits = factors
    check_x(op, x)
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_parameter(op, name, factor, x)
        if factor.dim() != 3 or 0 in factor.shape[:2]:
            letters = "(E, R, I)" if name == "lora_a" else "(E, R, O)"
            fail(op, name, f"have shape {letters} with E, R >= 1", tuple(factor.shape))
    experts, rank, _ = lora_b.shape
    in_features = x.shape[-1]
    if lora_a.shape != (experts, rank, in_features) and lora_a.shape != (1, rank, in_features):
        check_shape(op, "lora_a", lora_a, "(E, R, I)", (experts, rank, in_features))
    if (gate_weight is None) == (gate_logits is None):
        fail(op, _ONE_OF, "be given", "none" if gate_weight is None else f"gate_weight and {outside}")
    if gate_weight is not None:
        check_parameter(op, "gate_weight", gate_weight, x)
        check_shape(op, "gate_weight", gate_weight, "(E, I)", (experts, in_features))
    if gate_bias is not None:
        if gate_weight is None:
            fail(op, "gate_bias", f"be None if {outside} is given", type(gate_bias).__name__)
        check_parameter(op, "gate_bias", gate_bias, x)
        check_shape(op, "gate_bias", gate_bias, "(E)", (experts,))
    if gate_logits is not None:
        check_parameter(op, outside, gate_logits, x)
        check_shape(op, outside, gate_logits, "(..., E)", (*x.shape[:-1], experts))


def check_gates(op: str, gate_logits: Tensor | None, return_router_logits: bool) -> None:
    """Check what must not be given with gates. They take the place of gate_logits in the factors."""
    if gate_logits is not None:
        fail(op, _ONE_OF, "be given", "gate_logits and gates")
    if return_router_logits:
        fail(op, "return_router_logits", "be False if gates are given, which have no logits", return_router_logits)


def check_x(op: str, x: Tensor) -> None:
    """Check the tensor of tokens."""
    check_dense(op, "x", x)
    if x.dim() == 0:
        fail(op, "x", "have shape (..., I)", "a tensor without dimensions")


def check_gate(op: str, x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None) -> None:
    """Check a gate that is given without experts."""
    check_x(op, x)
    check_parameter(op, "gate_weight", gate_weight, x)
    if gate_weight.dim() != 2 or len(gate_weight) == 0 or gate_weight.shape[1] != x.shape[-1]:
        fail(op, "gate_weight", f"have shape (E, I) with E >= 1 and I = {x.shape[-1]}", tuple(gate_weight.shape))
    if gate_bias is not None:
        check_parameter(op, "gate_bias", gate_bias, x)
        check_shape(op, "gate_bias", gate_bias, "(E)", (len(gate_weight),))


def check_options(op: str, num_experts: int, options: Options) -> None:
    """Check the options, which are neither tensors nor sizes."""
    scaling, mixing, top_k, renormalize, dropout, softmax = options
    if type(scaling) is not float or not abs(scaling) <= _LARGEST:  # a check less for the usual scaling
        check_finite(op, "scaling", scaling, "be a finite number")
    if mixing not in MIXINGS:
        fail(op, "mixing", f"be one of {', '.join(map(repr, MIXINGS))}", repr(mixing))
    if top_k is not None:
        if not softmax:
            fail(op, "top_k", "be None if gates are given, of which a 0 drops an expert", top_k)
        check_positive_int(op, "top_k", top_k, at_most=("E", num_experts))
    check_bool(op, "renormalize", renormalize)
    if type(dropout) is not float or not 0.0 <= dropout < 1.0:
        must = "be a number of at least 0 and below 1"
        check_finite(op, "dropout", dropout, must, at_least=0)
        if dropout >= 1:
            fail(op, "dropout", must, repr(dropout))


def check_bool(op: str, name: str, value: bool) -> None:
    """Check a bool."""
    if not isinstance(value, bool):
        fail(op, name, "be a bool", type(value).__name__, TypeError)


def check_finite(op: str, name: str, value: float | None, must: str, at_least: float = -math.inf) -> None:
    """Check a Python number: not NaN, not infinite, and inside the range of a float."""
    number = cast(Any, value)  # the type of numbers.Real has no comparisons
    if not isinstance(value, Real):
        fail(op, name, must, type(value).__name__, TypeError)
    inside = abs(number) <= _LARGEST  # torch.compile cannot trace math.isfinite, which also raises for long ints
    if not (inside and number >= at_least):
        too_long = isinstance(value, int) and not inside
        fail(op, name, must, "an integer beyond the range of a float" if too_long else repr(value))


def check_positive_int(op: str, name: str, value: int, at_most: tuple[str, int] | None = None) -> None:
    """Check a count: an int of at least 1, and at most the given size."""
    if not isinstance(value, int) or isinstance(value, bool):
        fail(op, name, "be an int", type(value).__name__, TypeError)
    if at_most is not None and not 1 <= value <= at_most[1]:
        fail(op, name, f"be in 1 .. {at_most[0]} = {at_most[1]}", value)
    if value < 1:
        fail(op, name, "be at least 1", value)


def check_weight(op: str, weight: Tensor, bias: Tensor | None, x: Tensor, out_features: int) -> None:
    """Check the frozen linear layer of `lmoe_linear`."""
    shape = out_features, x.shape[-1]
    if not (is_plain(weight) and weight.dtype == x.dtype and weight.device == x.device and weight.shape == shape):
        check_like(op, "weight", weight, x)
        check_shape(op, "weight", weight, "(O, I)", shape)
    if bias is not None:
        check_like(op, "bias", bias, x)
        check_shape(op, "bias", bias, "(O)", (out_features,))


def check_base(op: str, base: Tensor, x: Tensor, out_features: int) -> None:
    """Check the tensor to which `lmoe` adds its delta."""
    check_like(op, "base", base, x)
    check_shape(op, "base", base, "(..., O)", (*x.shape[:-1], out_features))


def check_seed(op: str, seed: Tensor, x: Tensor) -> None:
    """Check the seed of the dropout."""
    check_dense(op, "seed", seed, (torch.int64,))
    check_shape(op, "seed", seed, "()", ())
    check_device(op, "seed", seed, x)


def check_dense(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Check that a tensor is strided, neither sparse nor nested, and has one of these dtypes."""
    if not isinstance(tensor, Tensor):
        fail(op, name, "be a torch.Tensor", type(tensor).__name__, TypeError)
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        fail(op, name, "be a dense tensor", got, TypeError)
    if tensor.dtype not in dtypes:
        fail(op, name, f"have one of the dtypes {', '.join(map(str, dtypes))}", tensor.dtype, TypeError)


def check_parameter(op: str, name: str, parameter: Tensor, x: Tensor) -> None:
    """Check a trained tensor: x's dtype or fp32 (master weights), x's device."""
    check_dense(op, name, parameter)
    if parameter.dtype != x.dtype and parameter.dtype != torch.float32:
        allowed = "torch.float32" if x.dtype == torch.float32 else f"{x.dtype} like x, or torch.float32"
        fail(op, name, f"have dtype {allowed}", parameter.dtype, TypeError)
    check_device(op, name, parameter, x)


def check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Check a tensor of the frozen layer: it must have x's dtype and device."""
    check_dense(op, name, tensor)
    if tensor.dtype != x.dtype:
        fail(op, name, f"have dtype {x.dtype} like x", tensor.dtype, TypeError)
    check_device(op, name, tensor, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Check that a tensor is on x's device."""
    if tensor.device != x.device:
        fail(op, name, f"be on {x.device} like x", tensor.device)


def check_shape(op: str, name: str, tensor: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    """Check a shape; the error shows the expected one as letters and as numbers."""
    if tensor.shape != shape:
        fail(op, name, f"have shape {letters} = {tuple(shape)}", tuple(tensor.shape))
