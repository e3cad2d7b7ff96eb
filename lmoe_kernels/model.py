"""What works on whole models: put L-MoE layers into one, list them, collect their router logits."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.checks import fail
from lmoe_kernels.layer import LMoELinear

ALL_LINEAR = "all-linear"
# These multiply by the weights of their layers themselves, always or where that is faster: experts would go unseen.
_PASS_THEIR_LAYERS_BY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def apply_lmoe(model: nn.Module, target_modules: str | Iterable[str], **options: Any) -> list[str]:
    r"""Put an `LMoELinear` around linear layers of a model, in place, and freeze everything else.

    Args:
        model: any module; its layers with `in_features` and `out_features` can be targets, save those that
            `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` hold and do not call.
        target_modules: names of layers, one or several: a whole name ("model.layers.0.self_attn.q_proj"), the end of one
            ("q_proj"), or a regular expression that the whole name matches (r".*\.mlp\..*"); or "all-linear", every
            such layer but the output embedding.
        options: the keywords of `LMoELinear`, and `dtype` as in `LMoELinear.from_linear`.
    Returns:
        the names of the layers that were changed, in the model's order.
    Raises:
        ValueError: a target matches no layer; why, or the nearest names, are told. The model is then as it was.
        TypeError: `model` is no module, or a target no name.
    """
    if not isinstance(model, nn.Module):
        fail("apply_lmoe", "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    several = isinstance(target_modules, Iterable) and not isinstance(target_modules, str)
    targets: list[Any] = list(target_modules) if several else [target_modules]
    if not all(isinstance(target, str) for target in targets):
        fail("apply_lmoe", "target_modules", "be a str or several", repr(target_modules), TypeError)
    linears = wrappable_layers(model)
    chosen = _matches(model, targets, linears)
    layers = {id(linears[name]): LMoELinear.from_linear(linears[name], **options) for name in chosen}
    replace_modules(model, {name: layers[id(linears[name])] for name in chosen})
    return chosen


def lmoe_layers(model: nn.Module) -> dict[str, LMoELinear]:
    """The L-MoE layers of a model, by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LMoELinear)}


def wrappable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be wrapped, under every name that it has: not those that are wrapped already, or never called."""
    taken = {id(layer.frozen_layer) for layer in lmoe_layers(model).values()}
    taken |= {id(layer) for m in model.modules() if isinstance(m, _PASS_THEIR_LAYERS_BY) for layer in m.children()}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and not isinstance(module, LMoELinear)
        and id(module) not in taken
    }


def collect_router_logits(model: nn.Module) -> dict[str, Tensor]:
    """The router logits of the last forward, by layer; of the layers with `output_router_logits` that have run.

    Under gradient checkpointing take `use_reentrant=False`: the reentrant kind runs its forward without gradients, and a
    loss on these logits would train nothing.

    Example:
        loss = model(...).loss + 0.01 * balance_loss(collect_router_logits(model).values())
    """
    layers = lmoe_layers(model).items()
    return {name: layer.router_logits for name, layer in layers if layer.router_logits is not None}


def replace_modules(model: nn.Module, layers: Mapping[str, LMoELinear]) -> None:
    """Set the layers at these names, and let nothing but experts and gates be trained."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    trained = {id(p) for layer in lmoe_layers(model).values() for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def _matches(model: nn.Module, targets: list[str], linears: dict[str, nn.Module]) -> list[str]:
    """The names that the targets mean. Each target must mean one at least."""
    if not targets:
        fail("apply_lmoe", "target_modules", "name at least one layer", targets)
    output = getattr(model, "get_output_embeddings", lambda: None)()
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
