"""Which layers of a model have experts, which can get them, and which of these a target names."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from lmoe_kernels.checks import fail
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.naming import plain_modules, unwrapped

ALL_LINEAR = "all-linear"
# These multiply by the weights of their layers themselves, always or where that is faster: experts would go unseen.
_PASS_THEIR_LAYERS_BY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def lmoe_layers(model: nn.Module) -> dict[str, LMoELinear]:
    """The L-MoE layers of a model, in its order, by their names in the plain model; a shared one under its first name."""
    found: dict[int, tuple[str, LMoELinear]] = {}
    for name, module in plain_modules(model).items():
        if isinstance(module, LMoELinear):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def wrappable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be wrapped, under every name that it has: not those that are wrapped already, or never called."""
    taken = {id(layer.frozen_layer) for layer in lmoe_layers(model).values()}
    taken |= {id(layer) for m in model.modules() if isinstance(m, _PASS_THEIR_LAYERS_BY) for layer in m.children()}
    return {
        name: module
        for name, module in plain_modules(model).items()
        if name
        and isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and not isinstance(module, LMoELinear)
        and id(module) not in taken
    }


def matches(model: nn.Module, targets: list[str], linears: dict[str, nn.Module]) -> list[str]:
    """The names that the targets mean. Each target must mean one at least."""
    if not targets:
        fail("apply_lmoe", "target_modules", "name at least one layer", targets)
    output = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            found = {name for name, module in linears.items() if module is not output}
        else:
            found = {name for name in linears if _means(target, name)}
        if not found:
            must = "match linear layers of the model"
            fail("apply_lmoe", "target_modules", must, f"{target!r}; {_hint(model, target, linears)}")
        chosen |= found
    return [name for name in linears if name in chosen]


def _means(target: str, name: str) -> bool:
    """Whether a target is this name, the end of it, or a regular expression for it."""
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error:
        return False


def _hint(model: nn.Module, target: str, linears: Iterable[str]) -> str:
    """Why a target matches nothing: what it names and why that cannot be wrapped, else the nearest names."""
    if target == ALL_LINEAR:
        return "the model has none left to wrap, or its output embedding alone"
    for name, module in model.named_modules():
        if not name or not _means(target, name):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, LMoELinear) or isinstance(parent, LMoELinear):
            return f"{name!r} has its experts already"
        if isinstance(parent, _PASS_THEIR_LAYERS_BY):
            return f"{name!r} is not called: {type(parent).__name__} multiplies by its weight itself"
        return f"{name!r} ({type(module).__name__}) has no in_features and out_features"
    known = list(dict.fromkeys(n for name in linears for n in (name.rpartition(".")[2], name)))
    if not known:
        return "the model has no linear layers left to wrap"
    nearest = get_close_matches(target, known, n=3, cutoff=0.5) or known[:3]
    return f"nearest: {', '.join(map(repr, nearest))}"
