"""What works on whole models: put L-MoE layers into one, collect their router logits."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.checks import fail
from lmoe_kernels.distributed import why_no_new_parameters
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.naming import actual_names
from lmoe_kernels.targets import lmoe_layers, matches, wrappable_layers


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
    if (reason := why_no_new_parameters(model)) is not None:
        fail("apply_lmoe", "model", "get its L-MoE layers before it is distributed", f"one {reason}")
    linears = wrappable_layers(model)
    chosen = matches(model, targets, linears)
    layers = {id(linears[name]): LMoELinear.from_linear(linears[name], **options) for name in chosen}
    replace_modules(model, {name: layers[id(linears[name])] for name in chosen})
    return chosen


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
    """Set the layers at these names of the plain model, and let nothing but experts and gates be trained."""
    actual = actual_names(model)
    for name, layer in layers.items():
        parent, _, child = actual[name].rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    trained = {id(p) for layer in lmoe_layers(model).values() for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
