"""Which layers of a model have experts, which can get them, and which of these a target names."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches

from torch import nn

from lmoe_kernels.checks import fail
from lmoe_kernels.layer import LMoELinear, features_of
from lmoe_kernels.naming import plain_modules, unwrapped

ALL_LINEAR = "all-linear"
_SAVED = "_lmoe_saved"  # set on a module of modules_to_save
# These multiply by the weights of their layers themselves, always or where that is faster: experts would go unseen.
_PASS_THEIR_LAYERS_BY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def lmoe_layers(model: nn.Module) -> dict[str, LMoELinear]:
    """The L-MoE layers of a model, in its order, by their names in the plain model; a shared one under its first name."""
    found: dict[int, tuple[str, LMoELinear]] = {}
    for name, layer in lmoe_layers_by_every_name(model).items():
        found.setdefault(id(layer), (name, layer))
    return dict(found.values())


def lmoe_layers_by_every_name(model: nn.Module) -> dict[str, LMoELinear]:
    """The L-MoE layers of a model by their names in the plain model; a shared one under each of its names."""
    return {name: module for name, module in plain_modules(model).items() if isinstance(module, LMoELinear)}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are trained and saved whole beside the experts, by their names in the plain model."""
    return {name: module for name, module in plain_modules(model).items() if getattr(module, _SAVED, False)}


def mark_saved(module: nn.Module) -> None:
    """From now on the module is trained, and saved with the experts."""
    setattr(module, _SAVED, True)
    module.requires_grad_(True)


def unmark_saved(module: nn.Module) -> None:
    """The module is like any other again; whether it is trained stays."""
    delattr(module, _SAVED)


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """In and out features of all linear layers under the heads, with experts or without, under every name that they have."""
    head = {id(module) for module in heads(model).values()}
    modules = plain_modules(model)
    return {name: size for name, size in _outermost(modules).items() if id(modules[name]) not in head}


def wrappable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be wrapped, under every name that it has.

    Not those that have experts already, are never called, or are trained and saved whole; nor what lies inside another.
    """
    modules = plain_modules(model)
    taken = {id(layer) for m in model.modules() if isinstance(m, _PASS_THEIR_LAYERS_BY) for layer in m.children()}
    taken |= {id(part) for module in saved_modules(model).values() for part in module.modules()}
    return {
        name: modules[name]
        for name in _outermost(modules)
        if not isinstance(modules[name], LMoELinear) and id(modules[name]) not in taken
    }


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """What a transformers model has around its base model, and the output embedding: no targets of "all-linear"."""
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
    """The names among the candidates that the targets mean. Each target must mean one at least."""
    chosen: set[str] = set()
    head = {id(module) for module in heads(model).values()}
    for target in targets:
        if target == ALL_LINEAR:
            found = {name for name, module in candidates.items() if id(module) not in head}
        else:
            found = {name for name in candidates if means(target, name)}
        if not found:
            what = "linear layers" if argument == "target_modules" else "modules"
            fail("apply_lmoe", argument, f"match {what} of the model", f"{target!r}; {hint(target)}")
        chosen |= found
    return [name for name in candidates if name in chosen]


def means(target: str, name: str) -> bool:
    """Whether a target is this name, the end of it, or a regular expression for it."""
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error:
        return False


def hint_for_layers(model: nn.Module, target: str, linears: Iterable[str]) -> str:
    """Why a target matches nothing: what it names and why that cannot be wrapped, else the nearest names."""
    if target == ALL_LINEAR:
        return "the model has none left to wrap, or its heads alone"
    modules = plain_modules(model)
    for name, module in modules.items():
        if not name or not means(target, name):
            continue
        parent = modules[name.rpartition(".")[0]]
        if isinstance(module, LMoELinear) or isinstance(parent, LMoELinear):
            return f"{name!r} has its experts already"
        if isinstance(parent, _PASS_THEIR_LAYERS_BY):
            return f"{name!r} is not called: {type(parent).__name__} multiplies by its weight itself"
        if features_of(module) is not None:
            return f"{name!r} is trained and saved whole, or lies inside another layer that is adapted"
        return f"{name!r} ({type(module).__name__}) has no in_features and out_features"
    if stack := next((name for name in stacked_experts(model) if means(target, name)), None):
        return f"{stack!r} is one parameter with the weights of several experts, no layer"
    return nearest(target, linears) or "the model has no linear layers left to wrap"


def nearest(target: str, names: Iterable[str]) -> str:
    """The names, or ends of names, that look like the target."""
    known = list(dict.fromkeys(n for name in names for n in (name.rpartition(".")[2], name)))
    close = get_close_matches(target, known, n=3, cutoff=0.5) or known[:3]
    return f"nearest: {', '.join(map(repr, close))}" if close else ""


def stacked_experts(model: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of several experts (MoE models): no layers, they cannot be wrapped."""
    return [
        f"{name}.{key}" if name else key
        for name, module in plain_modules(model).items()
        if not isinstance(module, (LMoELinear, *_CONVOLUTIONS))
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1
    ]


def _outermost(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """In and out features of the linear layers: not of parts of another one, as PEFT's and ours have them."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in modules.items():
        size = features_of(module)
        if name and size is not None and not _has_ancestor(name, found):
            found[name] = size
    return found


def _has_ancestor(name: str, names: Mapping[str, object]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in names for i in range(1, len(parts)))
