"""Models that transformers has quantised: which they are, and that a Trainer may train what stands beside their weights."""

import math
from typing import Any

from torch import nn

_OWN = "quantizer_without_lmoe"  # on the quantizer that stands in for it


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers has quantised this model, or the one that it is a part of."""
    config = getattr(model, "config", None)
    return any(
        found is not None for found in (getattr(model, "hf_quantizer", None), getattr(config, "quantization_config", None))
    )


def let_train(model: nn.Module) -> None:
    """Let Trainer take the model if it is quantised, as it takes one with PEFT's adapters."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_qat_trainable", False):
        model.hf_quantizer = _trainable(type(quantizer), {**vars(quantizer), _OWN: quantizer})


def restore(model: nn.Module) -> None:
    """Give the model its own quantizer back."""
    own = getattr(getattr(model, "hf_quantizer", None), _OWN, None)
    if own is not None:
        model.hf_quantizer = own


def numel_of(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for; bitsandbytes packs those of 4 bits."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


class _Trainable:
    """In front of a quantizer's class: Trainer refuses a quantised model unless PEFT is on it, or its quantizer says this.

    Whether a method of quantisation lets gradients through, `is_trainable`, the class still tells itself.
    """

    is_qat_trainable = True

    def __reduce__(self) -> tuple[Any, ...]:
        """The class has no name by which pickle would find it."""
        return _trainable, (type(self).__bases__[1], vars(self))


def _trainable(quantizer_class: type, state: dict[str, Any]) -> Any:
    """A quantizer of this class and state that says so."""
    quantizer = object.__new__(type(quantizer_class.__name__, (_Trainable, quantizer_class), {}))
    vars(quantizer).update(state)
    return quantizer
