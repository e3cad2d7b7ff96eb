# SPDX-License-Identifier: Apache-2.0
"""Finds the layers of a model that have experts, the layers that can get experts, and the layers that a target matches."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches

from torch import nn

from lmoe_kernels.checks import fail
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.linears import features_of
from lmoe_kernels.mixture import LayerWithExperts
from lmoe_kernels.naming import plain_modules, unwrapped, walk

ALL_LINEAR = "all-linear"
_SAVED = "_lmoe_saved"  # an attribute of the modules in modules_to_save
# These modules may use the weights of their linear layers without calling the layers, so experts would have no effect.
BYPASS_THEIR_LAYERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def lmoe_layers(model: nn.Module) -> dict[str, LMoELinear]:
    """Find the L-MoE layers of a model. Those of an adapter of `lmoe_kernels.peft` are not among them.

    Args:
        model: any model, plain or wrapped.

    Returns:
        the layers by their names in the plain model, in the model's order; a shared layer appears under its first name.
    """
    found: dict[int, tuple[str, LMoELinear]] = {}
    for name, layer in lmoe_layers_by_every_name(model).items():
        found.setdefault(id(layer), (name, layer))
    return dict(found.values())


def lmoe_layers_by_every_name(model: nn.Module) -> dict[str, LMoELinear]:
    """The L-MoE layers of a model by their names in the plain model; a shared layer appears under each of its names."""
    return {name: module for name, module in plain_modules(model).items() if isinstance(module, LMoELinear)}


def layers_with_experts(model: nn.Module) -> dict[str, LayerWithExperts]:
    """The layers of both kinds, `LMoELinear` and those of the PEFT tuner, by their first names in the plain model."""
    found: dict[int, tuple[str, LayerWithExperts]] = {}
    for name, _, module in walk(model, "", ""):
        if isinstance(module, LayerWithExperts):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def _names_with_experts(model: nn.Module) -> set[str]:
    """All names of the layers of both kinds in the plain model."""
    return {name for name, _, module in walk(model, "", "") if isinstance(module, LayerWithExperts)}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of modules_to_save, by their names in the plain model."""
    return {name: module for name, module in plain_modules(model).items() if getattr(module, _SAVED, False)}


def mark_saved(module: nn.Module) -> None:
    """Mark a module as one of modules_to_save, and make it trainable."""
    setattr(module, _SAVED, True)
    module.requires_grad_(True)


def unmark_saved(module: nn.Module) -> None:
    """Remove the mark of `mark_saved`; `requires_grad` does not change."""
    delattr(module, _SAVED)


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The in and out features of all linear layers except the heads, with or without experts, under all their names."""
    head = {id(module) for module in heads(model).values()}
    modules = plain_modules(model)
    return {name: size for name, size in _outermost(modules).items() if id(modules[name]) not in head}


def wrappable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be wrapped, under all their names.

    Excluded are layers that already have experts, are not called, belong to modules_to_save, or are inside another layer.
    """
    modules, with_experts = plain_modules(model), _names_with_experts(model)
    excluded = {id(layer) for m in model.modules() if isinstance(m, BYPASS_THEIR_LAYERS) for layer in m.children()}
    excluded |= {id(part) for module in saved_modules(model).values() for part in module.modules()}
    return {
        name: modules[name] for name in _outermost(modules) if name not in with_experts and id(modules[name]) not in excluded
    }


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The output embedding of a transformers model and its modules outside the base model; "all-linear" excludes them."""
    plain = unwrapped(model)
    output = getattr(plain, "get_output_embeddings", lambda: None)()
    base = getattr(plain, "base_model", None) if getattr(plain, "base_model_prefix", "") else None
    if not isinstance(base, nn.Module) or base is plain:
        return {name: module for name, module in plain_modules(model).items() if module is output}
    inside = {id(module) for module in base.modules()} | {id(plain)}
    return {name: module for name, module in plain_modules(model).items() if module is output or id(module) not in inside}


def matches(
    model: nn.Module, argument: str, targets: list[str], candidates: Mapping[str, nn.Module], hint: Callable[[str], str]
) -> list[str]:
    """The names of the candidates that match a target. Every target must match at least one."""
    chosen: set[str] = set()
    head = {id(module) for module in heads(model).values()}
    for target in targets:
        if target == ALL_LINEAR:
            found = {name for name, module in candidates.items() if id(module) not in head}
        else:
            found = {name for name in candidates if target_matches(target, name)}
        if not found:
            what = "linear layers" if argument == "target_modules" else "modules"
            fail("apply_lmoe", argument, f"match {what} of the model", f"{target!r}; {hint(target)}")
        chosen |= found
    return [name for name in candidates if name in chosen]


def target_matches(target: str, name: str) -> bool:
    """Whether a target equals this name, equals its last segments, or is a regular expression that matches it."""
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error:
        return False


def hint_for_layers(model: nn.Module, target: str, linears: Iterable[str]) -> str:
    """A text that says why a target matches nothing: why the module of that name cannot be wrapped, or the nearest names."""
    if target == ALL_LINEAR:
        return "the model has no linear layers left to wrap, except heads"
    modules = plain_modules(model)
    for name, module in modules.items():
        if not name or not target_matches(target, name):
            continue
        parent = modules[name.rpartition(".")[0]]
        if name in _names_with_experts(model) or isinstance(parent, LMoELinear):
            return f"{name!r} already has experts"
        if isinstance(parent, BYPASS_THEIR_LAYERS):
            return f"{name!r} is not called: {type(parent).__name__} uses its weight directly"
        if features_of(module) is not None:
            return f"{name!r} belongs to modules_to_save or is inside another linear layer"
        return f"{name!r} ({type(module).__name__}) has no in_features and out_features"
    if stack := next((name for name in stacked_experts(model) if target_matches(target, name)), None):
        return f"{stack!r} is one parameter with the weights of several experts, not a layer"
    return nearest(target, linears) or "the model has no linear layers left to wrap"


def nearest(target: str, names: Iterable[str]) -> str:
    """A text with the names, or last segments of names, that are most similar to the target."""
    known = list(dict.fromkeys(n for name in names for n in (name.rpartition(".")[2], name)))
    close = get_close_matches(target, known, n=3, cutoff=0.5) or known[:3]
    return f"nearest: {', '.join(map(repr, close))}" if close else ""


def stacked_experts(model: nn.Module) -> list[str]:
    """The names of parameters that contain the weights of several experts, as in MoE models. They cannot be wrapped."""
    ours = {id(part) for _, _, m in walk(model, "", "") if isinstance(m, LayerWithExperts) for part in m.modules()}
    return [
        f"{name}.{key}" if name else key
        for name, module in plain_modules(model).items()
        if id(module) not in ours and not isinstance(module, _CONVOLUTIONS)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1
    ]


def _outermost(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """The in and out features of the linear layers, without those inside another one (an L-MoE layer or one of PEFT)."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        size = features_of(module)
        if name and size is not None and not _has_ancestor(name, found):
            found[name] = size
    return found


def _has_ancestor(name: str, names: Mapping[str, object]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in names for i in range(1, len(parts)))
