"""The rule by which errors are judged: against float64 truth, relative to plain PyTorch's error."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ORDERS = 8  # in which plain PyTorch computes the same sums


class Errors(NamedTuple):
    """How far a result is from the truth."""

    rms: float  # root mean square
    largest: float


def errors(result: Tensor, true: Tensor) -> Errors:
    """The errors of a result; NaN or infinite where the result is not finite."""
    return Errors(*_sizes(result.double() - true))


def worst(found: Iterable[Errors]) -> Errors:
    """Of several results of plain PyTorch the largest error of either kind; NaN where one of them is."""
    columns = [list(column) for column in zip(*found, strict=True)]
    return Errors(*(math.nan if any(map(math.isnan, column)) else max(column) for column in columns))


def complaint(ours: Tensor, of_plain: Errors, true: Tensor, dtype: torch.dtype) -> str | None:
    """Why a result is wrong, None where it is right: its error may exceed plain PyTorch's only by a small term.

    Plain PyTorch's error is its largest over a few orders of the same sums: the error of a single order may be small by
    chance where a tensor depends on few numbers. The small term: one epsilon of the values' root mean square for the root
    mean square error, two epsilons of the largest value for the largest error; four times that in fp32 and fp64, where both
    errors are sums of a few roundings. Over 1,500 seeds of the smallest cases at most 0.8 of the allowed error was used.

    Args:
        dtype: that in which plain PyTorch computed.
    """
    if ours.shape != true.shape:
        return f"shape {tuple(ours.shape)}, not {tuple(true.shape)}"
    if true.numel() == 0:
        return None
    for prefix, finite in (
        ("", bool(ours.isfinite().all())),
        ("plain PyTorch is ", all(map(math.isfinite, of_plain))),
        ("the truth is ", bool(true.isfinite().all())),
    ):
        if not finite:  # a NaN exceeds no bound, and no error exceeds an infinite bound
            return f"{prefix}not finite"
    eps = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 4)
    of_ours, of_truth, epsilons = errors(ours, true), Errors(*_sizes(true)), Errors(1, 2)
    for kind, error, error_of_plain, size, count in zip(Errors._fields, of_ours, of_plain, of_truth, epsilons, strict=True):
        allowed = error_of_plain + count * eps * size
        if error > allowed:
            return f"{kind} error {error:.3e}, plain PyTorch {error_of_plain:.3e}, allowed {allowed:.3e}"
    return None


def assert_no_worse(name: str, ours: Tensor, plain: list[Tensor], true: Tensor) -> None:
    """Raise where a result is wrong by the rule of `complaint`; `plain` are plain PyTorch's results in several orders."""
    of_plain = worst(errors(other, true) for other in plain)
    found = complaint(ours, of_plain, true, plain[0].dtype)
    assert found is None, f"{name}: {found}"


def reordered(t: Tensor, letters: str, order: Mapping[str, Tensor]) -> Tensor:
    """A tensor with every dim whose letter has an order in that order.

    Args:
        letters: one for each dim of the tensor, such as "ERI".
    """
    for dim, letter in enumerate(letters):
        if letter in order and t.shape[dim] == len(order[letter]):  # a shared A has one expert, whatever E is
            t = t.index_select(dim, order[letter])
    return t


def _sizes(t: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude; 0 of an empty tensor."""
    return (t.square().mean().sqrt().item(), t.abs().max().item()) if t.numel() else (0.0, 0.0)
