"""What works on whole models: put L-MoE layers into one, list them, collect their router logits."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.checks import fail
from lmoe_kernels.layer import LMoELinear

ALL_LINEAR = "all-linear"


def apply_lmoe(model: nn.Module, target_modules: str | Iterable[str], **options: Any) -> list[str]:
    r"""Put an `LMoELinear` around linear layers of a model, in place, and freeze everything else.

    Args:
        model: any module; its layers with `in_features` and `out_features` can be targets.
        target_modules: names of layers, one or several: a whole name ("model.layers.0.self_attn.q_proj"), the end of one
            ("q_proj"), or a regular expression that the whole name matches (r".*\.mlp\..*"); or "all-linear", every
            such layer but the output embedding.
        options: the keywords of `LMoELinear`, and `dtype` as in `LMoELinear.from_linear`.
    Returns:
        the names of the layers that were changed, in the model's order.
    Raises:
        ValueError: a target matches no layer; the nearest names are told. The model is then as it was.
    """
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    linears = wrappable_layers(model)
    chosen = _matches(model, targets, linears)
    layers = {id(linears[name]): LMoELinear.from_linear(linears[name], **options) for name in chosen}
    replace_modules(model, {name: layers[id(linears[name])] for name in chosen})
    return chosen


def lmoe_layers(model: nn.Module) -> dict[str, LMoELinear]:
    """The L-MoE layers of a model, by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LMoELinear)}


def wrappable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be wrapped, under every name that it has. Layers that are wrapped already cannot."""
    wrapped = {id(layer.base_layer) for layer in lmoe_layers(model).values()}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and not isinstance(module, LMoELinear)
        and id(module) not in wrapped
    }


def collect_router_logits(model: nn.Module) -> dict[str, Tensor]:
    """The router logits of the last forward, by layer; of the layers with `output_router_logits` that have run.

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
            found = {name for name in linears if name == target or name.endswith(f".{target}") or _fullmatch(target, name)}
        if not found:
            fail(
                "apply_lmoe",
                "target_modules",
                "match linear layers of the model",
                f"{target!r}; {_nearest(target, linears)}",
            )
        chosen |= found
    return [name for name in linears if name in chosen]


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _nearest(target: str, names: Iterable[str]) -> str:
    """A hint for a name that matches nothing."""
    known = list(dict.fromkeys(n for name in names for n in (name.rpartition(".")[2], name)))
    if not known:
        return "the model has no linear layers left to wrap"
    nearest = get_close_matches(target, known, n=3, cutoff=0.5) or known[:3]
    return f"nearest: {', '.join(map(repr, nearest))}"
