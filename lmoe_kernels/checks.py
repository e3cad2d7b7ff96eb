"""Every check of user input. One voice: the operation, the argument, what it must be, what it was.

Only shapes, dtypes and devices are looked at, never values: no check waits for a GPU.
"""

import math
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXINGS = ("factors", "outputs")


def fail(op: str, argument: str, must: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise the one-line error of this package."""
    raise error(f"{op}: {argument} must {must}, got {got}")


def check_call(
    op: str,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate_weight: Tensor | None,
    gate_logits: Tensor | None,
    scaling: float,
    mixing: str,
    top_k: int | None,
) -> None:
    """Check the arguments that `lmoe` and `lmoe_linear` share.

    Raises:
        ValueError: a shape, a device or an option does not fit. TypeError: a type or dtype is not supported.
    """
    check_floating(op, "x", x)
    if x.dim() == 0:
        fail(op, "x", "have shape (..., I)", "a tensor without dimensions")
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_beside(op, name, factor, x)
        if factor.dim() != 3 or 0 in factor.shape[:2]:
            letters = "(E, R, I)" if name == "lora_a" else "(E, R, O)"
            fail(op, name, f"have shape {letters} with E, R >= 1", tuple(factor.shape))
    experts, rank, _ = lora_b.shape
    in_features = x.shape[-1]
    if lora_a.shape != (experts, rank, in_features) and lora_a.shape != (1, rank, in_features):
        check_shape(op, "lora_a", lora_a, "(E, R, I)", (experts, rank, in_features))
    if (gate_weight is None) == (gate_logits is None):
        both = "neither" if gate_weight is None else "both"
        fail(op, "gate_weight or gate_logits", "be given, exactly one of the two", both)
    if gate_weight is not None:
        check_beside(op, "gate_weight", gate_weight, x)
        check_shape(op, "gate_weight", gate_weight, "(E, I)", (experts, in_features))
    if gate_logits is not None:
        check_beside(op, "gate_logits", gate_logits, x)
        check_shape(op, "gate_logits", gate_logits, "(..., E)", (*x.shape[:-1], experts))
    check_options(op, experts, scaling, mixing, top_k)


def check_options(op: str, num_experts: int, scaling: float, mixing: str, top_k: int | None) -> None:
    """Check what is neither tensor nor size."""
    check_finite(op, "scaling", scaling, "be a finite number")
    if mixing not in MIXINGS:
        fail(op, "mixing", f"be one of {', '.join(map(repr, MIXINGS))}", repr(mixing))
    if top_k is not None:
        check_positive_int(op, "top_k", top_k, at_most=("E", num_experts))


def check_finite(op: str, name: str, value: float, must: str, at_least: float = -math.inf) -> None:
    """Check a number of Python: neither NaN nor infinite, nor beyond what a float holds."""
    if not isinstance(value, Real):
        fail(op, name, must, type(value).__name__, TypeError)
    try:
        fits = -math.inf < float(value) < math.inf and value >= at_least  # torch.compile cannot trace math.isfinite here
    except OverflowError:
        fail(op, name, must, "an integer beyond the range of a float")
    if not fits:
        fail(op, name, must, repr(value))


def check_positive_int(op: str, name: str, value: int, at_most: tuple[str, int] | None = None) -> None:
    """Check a count: an int of at least one."""
    if not isinstance(value, int) or isinstance(value, bool):
        fail(op, name, "be an int", type(value).__name__, TypeError)
    if at_most is not None and not 1 <= value <= at_most[1]:
        fail(op, name, f"be in 1 .. {at_most[0]} = {at_most[1]}", value)
    if value < 1:
        fail(op, name, "be at least 1", value)


def check_weight(op: str, weight: Tensor, bias: Tensor | None, x: Tensor, out_features: int) -> None:
    """Check the frozen linear layer of `lmoe_linear`."""
    check_like(op, "weight", weight, x)
    check_shape(op, "weight", weight, "(O, I)", (out_features, x.shape[-1]))
    if bias is not None:
        check_like(op, "bias", bias, x)
        check_shape(op, "bias", bias, "(O)", (out_features,))


def check_base(op: str, base: Tensor, x: Tensor, out_features: int) -> None:
    """Check the tensor to which `lmoe` adds its delta."""
    check_like(op, "base", base, x)
    check_shape(op, "base", base, "(..., O)", (*x.shape[:-1], out_features))


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Check for a tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        fail(op, name, "be a torch.Tensor", type(tensor).__name__, TypeError)
    if tensor.dtype not in DTYPES:
        fail(op, name, f"have a dtype of {', '.join(map(str, DTYPES))}", tensor.dtype, TypeError)


def check_beside(op: str, name: str, parameter: Tensor, x: Tensor) -> None:
    """Check a trained tensor: x's dtype or fp32 (master weights), x's device."""
    check_floating(op, name, parameter)
    if parameter.dtype != x.dtype and parameter.dtype != torch.float32:
        allowed = "torch.float32" if x.dtype == torch.float32 else f"{x.dtype} as x, or torch.float32"
        fail(op, name, f"have dtype {allowed}", parameter.dtype, TypeError)
    check_device(op, name, parameter, x)


def check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Check a tensor that takes part in the frozen product: x's dtype and device."""
    check_floating(op, name, tensor)
    if tensor.dtype != x.dtype:
        fail(op, name, f"have dtype {x.dtype} as x", tensor.dtype, TypeError)
    check_device(op, name, tensor, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Check that a tensor lies where x lies."""
    if tensor.device != x.device:
        fail(op, name, f"be on {x.device} as x", tensor.device)


def check_shape(op: str, name: str, tensor: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    """Check a shape, told in letters and in numbers."""
    if tensor.shape != shape:
        fail(op, name, f"have shape {letters} = {tuple(shape)}", tuple(tensor.shape))
