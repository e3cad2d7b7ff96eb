# SPDX-License-Identifier: Apache-2.0
"""Recognises models that transformers has quantised, and makes Trainer accept them if they have L-MoE layers."""

import math
from typing import Any

from torch import nn

_ORIGINAL = "quantizer_without_lmoe"  # attribute of the replacement quantizer


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers has quantised this model or the model that it is a part of."""
    config = getattr(model, "config", None)
    return any(
        found is not None for found in (getattr(model, "hf_quantizer", None), getattr(config, "quantization_config", None))
    )


def allow_training(model: nn.Module) -> None:
    """Make Trainer accept the model if it is quantised, as it accepts one with adapters of PEFT."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_qat_trainable", False):
        model.hf_quantizer = _trainable(type(quantizer), {**vars(quantizer), _ORIGINAL: quantizer})


def restore(model: nn.Module) -> None:
    """Restore the model's original quantizer."""
    original = getattr(getattr(model, "hf_quantizer", None), _ORIGINAL, None)
    if original is not None:
        model.hf_quantizer = original


def numel_of(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter before quantisation. bitsandbytes packs two 4-bit elements into a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


class _Trainable:
    """A base class in front of the quantizer's class: Trainer accepts a quantised model without PEFT if this flag is True.

    `is_trainable`, whether the method of quantisation supports gradients at all, still comes from the quantizer's class.
    """

    is_qat_trainable = True

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by `_trainable`, because the class is created at run time and pickle cannot find it by name."""
        return _trainable, (type(self).__bases__[1], vars(self))


def _trainable(quantizer_class: type, state: dict[str, Any]) -> Any:
    """Create a quantizer with this state, whose class is `_Trainable` and then `quantizer_class`."""
    quantizer = object.__new__(type(quantizer_class.__name__, (_Trainable, quantizer_class), {}))
    vars(quantizer).update(state)
    return quantizer
