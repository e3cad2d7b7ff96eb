"""The rule by which errors are judged: against float64 truth, next to plain PyTorch's error."""

import torch
from torch import Tensor


def assert_no_worse(name: str, ours: Tensor, plain: list[Tensor], true: Tensor) -> None:
    """Our error may not exceed plain PyTorch's in the same dtype by more than a small term.

    Plain PyTorch's error is its largest over a few orders of the same sums: one order alone is luck where a tensor hangs on
    few numbers. The small term: one epsilon of the values' root mean square for the root mean square error, two epsilons of
    the largest value for the largest error; four times that in fp32 and fp64, where both errors are sums of a few roundings.
    Over 1,500 seeds of the smallest cases up to 0.8 of what is allowed was used.
    """
    assert ours.shape == true.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(true.shape)}"
    if true.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name}: not finite"
    eps = torch.finfo(plain[0].dtype).eps * (1 if plain[0].dtype.itemsize == 2 else 4)
    for kind, size, epsilons in (("rms", _rms, 1), ("largest", _largest, 2)):
        error, error_of_plain = size(ours.double() - true), max(size(other.double() - true) for other in plain)
        allowed = error_of_plain + epsilons * eps * size(true)
        assert error <= allowed, (
            f"{name}: {kind} error {error:.3e}, plain PyTorch {error_of_plain:.3e}, allowed {allowed:.3e}"
        )


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _largest(t: Tensor) -> float:
    return t.abs().max().item()
