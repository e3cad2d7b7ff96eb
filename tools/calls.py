"""Call forward and backward of one backend as the ops call them, without checks of the input."""

from collections.abc import Mapping

from torch import Tensor

from lmoe_kernels import dispatch
from lmoe_kernels.options import Factors, Gradients, Options, Saved, Wanted

DEFAULTS = Options()


def factors_of(tensors: Mapping[str, Tensor]) -> Factors:
    """The factors among named tensors."""
    return Factors(**{name: tensors[name] for name in Factors._fields if name in tensors})


def everything(factors: Factors) -> Wanted:
    """The gradients of x and of all factors that are given."""
    return Wanted(True, *(factor is not None for factor in factors))


def forward(
    backend: str, x: Tensor, factors: Factors, options: Options = DEFAULTS, *, base: Tensor | None = None, save: bool = True
) -> tuple[Tensor, Saved | None]:
    """y (T, O), and what backward needs if `save`."""
    return dispatch.load(backend).forward(x, factors, base, options, save=save)


def forward_saved(
    backend: str, x: Tensor, factors: Factors, options: Options = DEFAULTS, *, base: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """The same with save=True, for a backward that follows."""
    y, saved = forward(backend, x, factors, options, base=base)
    assert saved is not None
    return y, saved


def backward(
    backend: str,
    dy: Tensor,
    x: Tensor | None,
    factors: Factors,
    saved: Saved,
    options: Options = DEFAULTS,
    *,
    dlogits: Tensor | None = None,
    wanted: Wanted | None = None,
) -> Gradients:
    """The gradients that are wanted; by default those of x and of all given factors."""
    wanted = everything(factors) if wanted is None else wanted
    return dispatch.load(backend).backward(dy, dlogits, x, factors, saved, options, wanted=wanted)
