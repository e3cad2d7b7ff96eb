"""What works on whole models: put L-MoE layers into one, switch them off, take them out, look at what is trained."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import pretrained
from lmoe_kernels.checks import fail
from lmoe_kernels.config import LayerConfig, refuse_unknown
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.distributed import how_distributed
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.naming import is_of_peft, plain_modules, set_modules, unwrapped
from lmoe_kernels.options import Mixing
from lmoe_kernels.quantised import numel_of
from lmoe_kernels.targets import (
    ALL_LINEAR,
    heads,
    hint_for_layers,
    lmoe_layers,
    lmoe_layers_by_every_name,
    mark_saved,
    matches,
    means,
    nearest,
    saved_modules,
    stacked_experts,
    unmark_saved,
    wrappable_layers,
)


def apply_lmoe(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    modules_to_save: str | Iterable[str] = (),
    dtype: torch.dtype | None = None,
    num_experts: int = 8,
    rank: int = 16,
    alpha: float | None = None,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    shared_a: bool = False,
    gate_bias: bool = False,
    gate_init_std: float | None = None,
    output_router_logits: bool = False,
    backend: BackendName | None = None,
    **unknown: NoReturn,
) -> list[str]:
    r"""Put an `LMoELinear` around linear layers of a model, in place.

    The first call freezes everything but experts, gates and `modules_to_save`; a later one freezes no more than the layers
    that it wraps. In a PEFT model nothing else is frozen, and an adapted layer gets its experts below PEFT's adapter: both
    are trained. The keywords from `num_experts` on are those of `LMoELinear`.

    Args:
        model: any module; its layers with `in_features` and `out_features` (and transformers' Conv1D) can be targets, save
            those that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` hold and do not call. Give the whole model:
            transformers' `save_pretrained` of one that was given in part does not know of the layers.
        target_modules: names of layers, one or several: a whole name ("model.layers.0.self_attn.q_proj"), the end of one
            ("q_proj"), or a regular expression that the whole name matches (`r".*\.mlp\..*"`); or "all-linear", every such
            layer but the model's heads (a transformers model's output embedding, its classifier, what else it has around
            its base model). Names are those of the plain model, whatever wraps it.
        modules_to_save: names, likewise, of modules that are trained as they are and saved with the experts: a newly
            initialised classifier, say.
        dtype: of experts and gates, see `LMoELinear.from_linear`.

    Returns:
        the names of the layers that were changed, in the model's order.

    Raises:
        ValueError: a target matches nothing; why, or the nearest names, are told. A model that is distributed already
            (DDP, FSDP): apply before. The model is then as it was.
        TypeError: `model` is no module, or a target no name.
    """
    refuse_unknown(unknown)
    config = LayerConfig(
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        mixing=mixing,
        top_k=top_k,
        renormalize=renormalize,
        shared_a=shared_a,
        gate_bias=gate_bias,
        gate_init_std=gate_init_std,
        output_router_logits=output_router_logits,
        backend=backend,
    )
    if not isinstance(model, nn.Module):
        fail("apply_lmoe", "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    targets, saved = _names("target_modules", target_modules), _names("modules_to_save", modules_to_save)
    if not targets:
        fail("apply_lmoe", "target_modules", "name at least one layer", targets)
    if (how := how_distributed(model)) is not None:
        fail("apply_lmoe", "model", "get its L-MoE layers before it is distributed", f"one {how}")
    modules = {name: module for name, module in plain_modules(model).items() if name}
    whole = matches(model, "modules_to_save", saved, modules, lambda target: nearest(target, modules)) if saved else []
    for name in whole:
        if any(isinstance(part, LMoELinear) for part in modules[name].modules()):
            fail("apply_lmoe", "modules_to_save", "name modules without L-MoE layers", repr(name))
    parts = {id(part) for name in whole for part in modules[name].modules()}
    linears = {name: linear for name, linear in wrappable_layers(model).items() if id(linear) not in parts}
    chosen = matches(model, "target_modules", targets, linears, lambda target: hint_for_layers(model, target, linears))
    _warn_of_what_is_left(model, targets, whole)

    layers = wrapped({name: linears[name] for name in chosen}, lambda name: (config, dtype))
    replace_modules(model, layers, whole)
    return chosen


def wrapped(
    linears: Mapping[str, nn.Module], options_of: Callable[[str], tuple[LayerConfig, torch.dtype | None]]
) -> dict[str, LMoELinear]:
    """A new layer around each of these; one around a linear layer of several names. An error leaves them as they were."""
    trained = [p for linear in linears.values() for p in linear.parameters() if p.requires_grad]
    layers: dict[int, LMoELinear] = {}
    try:
        for name, linear in linears.items():
            if id(linear) not in layers:
                layers[id(linear)] = LMoELinear.from_config(linear, *options_of(name))
    except BaseException:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return {name: layers[id(linear)] for name, linear in linears.items()}


def replace_modules(model: nn.Module, layers: Mapping[str, LMoELinear], modules_to_save: Iterable[str] = ()) -> None:
    """Set the layers at these names of the plain model; the first ones freeze what they, PEFT and modules_to_save leave."""
    modules = plain_modules(model)
    if layers and not lmoe_layers(model) and not _is_trained_by_peft(model):
        model.requires_grad_(False)
    set_modules(model, layers)
    for name in modules_to_save:
        mark_saved(modules[name])
    pretrained.install(model)


def train_lmoe(model: nn.Module) -> None:
    """Let experts, gates and modules_to_save be trained, whatever has been frozen since; nothing else is changed.

    `peft.get_peft_model` freezes them where it wraps a model that has L-MoE layers already: call this after it. Then PEFT's
    model saves experts and gates too.
    """
    pretrained.install(model)
    for layer in lmoe_layers(model).values():
        for key in layer.shapes():
            getattr(layer, key).requires_grad_(True)
    for module in saved_modules(model).values():
        module.requires_grad_(True)


def remove_lmoe(model: nn.Module) -> list[str]:
    """Put the frozen layers back in the place of all L-MoE layers; experts and gates are gone.

    The frozen layers are the very modules that were wrapped, bit for bit, and stay frozen (`requires_grad_(True)` to train
    them). Modules that were given as modules_to_save keep what they have learned, and are like any other again.

    Returns:
        the names of the layers in the plain model.

    Raises:
        ValueError: the model is itself an `LMoELinear` (take its `frozen_layer`), or is distributed (DDP, FSDP).
    """
    if (how := how_distributed(model)) is not None:
        fail("remove_lmoe", "model", "be taken out of what distributes it", f"one {how}")
    layers = lmoe_layers_by_every_name(model)
    if "" in layers:
        fail("remove_lmoe", "model", "hold L-MoE layers", "one of them (take its frozen_layer)")
    set_modules(model, {name: layer.frozen_layer for name, layer in layers.items()})
    for module in saved_modules(model).values():
        unmark_saved(module)
    pretrained.restore(model)
    return list(layers)


@contextmanager
def disable_lmoe(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes as the frozen model does. It holds for all threads that run the model.

    Modules that were given as modules_to_save compute with what they have learned.

    Example:
        with disable_lmoe(model), torch.no_grad():
            reference_logits = model(ids).logits
    """
    layers = list(lmoe_layers(model).values())
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many numbers of a model are trained, and how many it has, as PEFT does; tied ones count once."""
    sizes = [(numel_of(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trained, every = sum(size for size, wanted in sizes if wanted), sum(size for size, _ in sizes)
    print(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / max(every, 1):.4f}")


def collect_router_logits(model: nn.Module) -> dict[str, Tensor]:
    """The router logits of the last forward, by layer; of the layers with `output_router_logits` that have run.

    Under gradient checkpointing take `use_reentrant=False`: the reentrant kind runs its forward without gradients, and a
    loss on these logits would train nothing, of which one warning tells.

    Example:
        loss = model(...).loss + 0.01 * balance_loss(collect_router_logits(model).values())
    """
    layers = {n: layer for n, layer in lmoe_layers(model).items() if layer.output_router_logits}
    logits = {name: layer.router_logits for name, layer in layers.items() if layer.router_logits is not None}
    if torch.is_grad_enabled() and any(_is_cut_off(layers[name], kept) for name, kept in logits.items()):
        warnings.warn(
            "collect_router_logits: router logits of layers in training carry no gradient, so that a loss on them trains "
            "nothing. Reentrant gradient checkpointing does that: say use_reentrant=False.",
            stacklevel=2,
        )
    return logits


def _is_cut_off(layer: LMoELinear, logits: Tensor) -> bool:
    """Whether a layer's gate is trained, and its router logits were computed where no graph is kept."""
    return layer.training and layer.gate_weight.requires_grad and not logits.requires_grad


def _names(argument: str, names: Any) -> list[str]:
    """One name or several, as a list."""
    several = isinstance(names, Iterable) and not isinstance(names, str)
    listed: list[Any] = list(names) if several else [names]
    if not all(isinstance(name, str) for name in listed):
        fail("apply_lmoe", argument, "be a str or several", repr(names), TypeError)
    return listed


def _is_trained_by_peft(model: nn.Module) -> bool:
    """Whether PEFT has put adapters or prompts into the model: it has frozen the rest already."""
    return any(map(is_of_peft, model.modules()))


def _warn_of_what_is_left(model: nn.Module, targets: list[str], whole: list[str]) -> None:
    """One warning for weights that cannot be wrapped though the targets mean them, one for a head that is frozen."""
    stacks = stacked_experts(model)
    meant = [
        n for n in stacks if ALL_LINEAR in targets or any(means(t, n) or means(t, n.rpartition(".")[0]) for t in targets)
    ]
    if meant:
        shown = ", ".join(map(repr, meant[:3])) + (", ..." if len(meant) > 3 else "")
        warnings.warn(
            f"apply_lmoe: {shown} hold the weights of several experts in one parameter, not in linear layers: they are "
            "frozen and get no L-MoE layers.",
            stacklevel=3,
        )
    output = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    inside = (*whole, *saved_modules(model))
    for name, module in heads(model).items():
        kept = any(name == saved or name.startswith(f"{saved}.") for saved in inside)
        if output is None and "." not in name and not kept and any(True for _ in module.parameters()):
            warnings.warn(
                f"apply_lmoe: the head {name!r} is frozen; if it is newly initialised, give modules_to_save=[{name!r}].",
                stacklevel=3,
            )
