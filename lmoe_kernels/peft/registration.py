# SPDX-License-Identifier: Apache-2.0
"""Adds the type "LMOE" to PEFT, which can then create and load adapters of it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

_NAME, _OLDEST = "LMOE", (0, 18)
_INSTALL = "pip install 'peft>=0.18'"


def require_peft() -> None:
    """Check that a version of PEFT that this package works with is installed.

    Raises:
        ImportError: PEFT is missing or too old; the message says how to install it.
    """
    try:
        installed = version("peft")
    except PackageNotFoundError as error:
        raise ImportError(f"lmoe_kernels.peft: peft must be installed: {_INSTALL}") from error
    if tuple(int(part) for part in installed.split(".")[:2]) < _OLDEST:
        raise ImportError(f"lmoe_kernels.peft: peft must be 0.18 or newer, got {installed}: {_INSTALL}")


def register(config_class: type, model_class: type) -> None:
    """Let PEFT find these classes by the type "LMOE". A second call with the same classes, or new versions, replaces."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    kind = peft_type()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if registered is not None:
        if registered.__module__ != config_class.__module__:
            raise ImportError(f"lmoe_kernels.peft: the type {_NAME} of PEFT must be free, got {registered}")
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(kind)
    register_peft_method(name=_NAME.lower(), config_cls=config_class, model_cls=model_class)


def peft_type() -> Any:
    """The member "LMOE" of PEFT's enumeration of adapter types, which is added to it at the first call."""
    from peft.utils import PeftType

    if _NAME not in PeftType.__members__:
        # An enumeration with members cannot be extended in any public way, and `register_peft_method` accepts members only.
        member: Any = str.__new__(PeftType, _NAME)
        member._name_, member._value_ = _NAME, _NAME
        member._sort_order_ = len(PeftType._member_names_)
        type.__setattr__(PeftType, _NAME, member)
        PeftType._member_names_.append(_NAME)
        PeftType._member_map_[_NAME] = member
        PeftType._value2member_map_[_NAME] = member
    return PeftType[_NAME]
