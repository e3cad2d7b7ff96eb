# SPDX-License-Identifier: Apache-2.0
"""Functions on whole models: add L-MoE layers, train, disable or remove them, collect their router logits."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import pretrained
from lmoe_kernels.checks import check_bool, fail
from lmoe_kernels.config import LayerConfig, RouterReads, RouterScope, refuse_unknown
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.distributed import how_distributed
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.linears import features_of
from lmoe_kernels.naming import is_of_peft, plain_modules, set_modules, unwrapped
from lmoe_kernels.options import Mixing
from lmoe_kernels.quantised import numel_of
from lmoe_kernels.router_scopes import scopes_of
from lmoe_kernels.routers import disconnect_hooks, share_routers
from lmoe_kernels.stack_models import stack_layers
from lmoe_kernels.targets import (
    ALL_LINEAR,
    heads,
    hint_for_layers,
    layers_with_experts,
    lmoe_layers,
    lmoe_layers_by_every_name,
    mark_saved,
    matches,
    nearest,
    saved_modules,
    stacked_experts,
    target_matches,
    unmark_saved,
    wrappable_layers,
)


def apply_lmoe(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    modules_to_save: str | Iterable[str] = (),
    dtype: torch.dtype | None = None,
    stack: bool = True,
    num_experts: int = 8,
    rank: int = 16,
    alpha: float | None = None,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    shared_a: bool = False,
    gate_bias: bool = False,
    choice_bias: bool = False,
    expert_names: Sequence[str] | None = None,
    router: RouterScope = "layer",
    router_reads: RouterReads = "token",
    dropout: float = 0.0,
    gate_init_std: float | None = None,
    output_router_logits: bool = False,
    backend: BackendName | None = None,
    **unknown: NoReturn,
) -> list[str]:
    r"""Replace linear layers of a model by `LMoELinear` layers around them, in place.

    The first call freezes all parameters except experts, gates and `modules_to_save`; later calls freeze only the layers
    that they wrap. In a PEFT model only those are frozen too: an adapted layer gets experts inside PEFT's adapter, and both
    are trained. The keywords from `num_experts` on are those of `LMoELinear`. An error leaves the model unchanged.

    Args:
        model: any module. Targets can be its layers with `in_features` and `out_features`, and transformers' Conv1D, except
            those inside `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, which do not call them. Pass the whole
            transformers model: given a part of it, its `save_pretrained` does not handle the L-MoE layers.
        target_modules: one or several names of layers. A name is a full name ("model.layers.0.self_attn.q_proj"), the last
            segments of one ("q_proj"), or a regular expression for a full name (`r".*\.mlp\..*"`). "all-linear" means every
            possible target except the heads: the output embedding of a transformers model and its modules outside the base
            model, such as a classifier. Wrappers around the model do not change the names.
        modules_to_save: one or several names of modules that are trained directly and saved with the experts, for example a
            newly initialised classifier.
        dtype: dtype of experts and gates, see `LMoELinear.from_linear`.
        stack: whether layers of one module that read the same input by their names, such as q_proj, k_proj and v_proj, are
            computed together where they can be. Results are the same within rounding. It is not stored in a checkpoint.

    Returns:
        the names of the wrapped layers, in the model's order.

    Raises:
        ValueError: a target matches no layer (the error says why or suggests names), an option does not fit, or the model
            is already distributed (DDP, FSDP).
        TypeError: an argument or an option has the wrong type, or an option has an unknown name.
    """
    refuse_unknown(unknown)
    check_bool("apply_lmoe", "stack", stack)
    config = LayerConfig(
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        mixing=mixing,
        top_k=top_k,
        renormalize=renormalize,
        shared_a=shared_a,
        gate_bias=gate_bias,
        choice_bias=choice_bias,
        expert_names=expert_names,
        router=router,
        router_reads=router_reads,
        dropout=dropout,
        gate_init_std=gate_init_std,
        output_router_logits=output_router_logits,
        backend=backend,
    )
    targets, linears, saved = _selected(model, target_modules, modules_to_save)
    _warn_of_frozen_weights(model, targets, saved)
    layers = wrap_linears("apply_lmoe", model, linears, lambda name: (config, dtype))
    replace_modules(model, layers, saved, stack=stack)
    return list(linears)


def _selected(
    model: nn.Module, target_modules: str | Iterable[str], modules_to_save: str | Iterable[str]
) -> tuple[list[str], dict[str, nn.Module], list[str]]:
    """Check the arguments of `apply_lmoe`. Return the targets, the linear layers to wrap, the names of modules_to_save."""
    if not isinstance(model, nn.Module):
        fail("apply_lmoe", "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    targets, to_save = _names("target_modules", target_modules), _names("modules_to_save", modules_to_save)
    if not targets:
        fail("apply_lmoe", "target_modules", "name at least one layer", targets)
    if (how := how_distributed(model)) is not None:
        fail("apply_lmoe", "model", "get its L-MoE layers before it is distributed", f"one {how}")
    modules = {name: module for name, module in plain_modules(model).items() if name}
    saved: list[str] = []
    if to_save:
        saved = matches(model, "modules_to_save", to_save, modules, lambda target: nearest(target, modules))
    for name in saved:
        if any(isinstance(part, LMoELinear) for part in modules[name].modules()):
            fail("apply_lmoe", "modules_to_save", "name modules without L-MoE layers", repr(name))
    parts = {id(part) for name in saved for part in modules[name].modules()}
    linears = {name: linear for name, linear in wrappable_layers(model).items() if id(linear) not in parts}
    names = matches(model, "target_modules", targets, linears, lambda target: hint_for_layers(model, target, linears))
    return targets, {name: linears[name] for name in names}, saved


def wrap_linears(
    op: str,
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    options_of: Callable[[str], tuple[LayerConfig, torch.dtype | None]],
) -> dict[str, LMoELinear]:
    """Create a layer around each of these linear layers of a model, one for a linear layer with several names.

    An error leaves the linear layers unchanged, also that layers do not fit those with which they would share a router.
    """
    options = {name: options_of(name) for name in linears}
    sizes = {name: (layer.options(), layer.in_features) for name, layer in lmoe_layers(model).items()}
    firsts = {id(linears[name]): name for name in reversed(list(linears))}
    sizes |= {name: (options[name][0], (features_of(linears[name]) or (0, 0))[0]) for name in firsts.values()}
    scopes_of(op, model, sizes)
    trained = [p for linear in linears.values() for p in linear.parameters() if p.requires_grad]
    layers: dict[int, LMoELinear] = {}
    try:
        for name, linear in linears.items():
            if id(linear) not in layers:
                layers[id(linear)] = LMoELinear.from_config(linear, *options[name])
    except BaseException:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return {name: layers[id(linear)] for name, linear in linears.items()}


def replace_modules(
    model: nn.Module,
    layers: Mapping[str, LMoELinear],
    modules_to_save: Iterable[str] = (),
    *,
    stack: bool = True,
) -> None:
    """Replace the modules at these names of the plain model by L-MoE layers with their routers, and mark modules_to_save.

    If the model has no L-MoE layers yet and is not trained by PEFT, all its parameters are frozen first. With `stack`,
    layers that read the same input are computed together.
    """
    modules = plain_modules(model)
    if layers and not lmoe_layers(model) and not _is_trained_by_peft(model):
        model.requires_grad_(False)
    set_modules(model, layers)
    share_routers(model, lmoe_layers(model))
    if stack:
        stack_layers(model)
    for name in modules_to_save:
        mark_saved(modules[name])
    pretrained.install(model)


def train_lmoe(model: nn.Module) -> None:
    """Make experts, gates and modules_to_save trainable again. Other parameters do not change.

    `peft.get_peft_model` freezes them if it wraps a model that already has L-MoE layers: call this function after it. The
    PEFT model then also saves experts and gates.

    Args:
        model: a model with L-MoE layers, plain or wrapped.
    """
    pretrained.install(model)
    for layer in lmoe_layers(model).values():
        for part in (layer, layer.router):
            for parameter in () if part is None else part.parameters(recurse=False):
                parameter.requires_grad_(True)
    for module in saved_modules(model).values():
        module.requires_grad_(True)


def remove_lmoe(model: nn.Module) -> list[str]:
    """Replace all L-MoE layers of a model by their frozen layers. Experts and gates are discarded.

    The frozen layers are the modules that were wrapped, bit for bit. They stay frozen; call `requires_grad_(True)` to train
    them. Modules of modules_to_save keep their trained values, and are no longer marked as such.

    Args:
        model: a model with L-MoE layers, plain or wrapped.

    Returns:
        the names of the layers in the plain model.

    Raises:
        ValueError: the model itself is an `LMoELinear` (use its `frozen_layer`), or it is distributed (DDP, FSDP).
    """
    if (how := how_distributed(model)) is not None:
        fail("remove_lmoe", "model", "not be distributed", f"one {how}")
    layers = lmoe_layers_by_every_name(model)
    if "" in layers:
        fail("remove_lmoe", "model", "contain L-MoE layers", "an LMoELinear (use its frozen_layer)")
    for layer in layers.values():
        if layer.router is not None:
            disconnect_hooks(layer.router.sequences)
    set_modules(model, {name: layer.frozen_layer for name, layer in layers.items()})
    for module in saved_modules(model).values():
        unmark_saved(module)
    pretrained.restore(model)
    return list(layers)


@contextmanager
def disable_lmoe(model: nn.Module) -> Iterator[None]:
    """Disable the L-MoE layers of a model within a `with` block: they compute only their frozen layers.

    This applies to all threads that run the model. Modules of modules_to_save keep their trained values.

    Args:
        model: a model with L-MoE layers, plain or wrapped.

    Example:
        with disable_lmoe(model), torch.no_grad():
            reference_logits = model(ids).logits
    """
    layers = list(lmoe_layers(model).values())
    parts = [*layers, *(layer.router for layer in layers if layer.router is not None)]
    before = [part.disabled for part in parts]
    try:
        for part in parts:
            part.disabled = True
        yield
    finally:
        for part, disabled in zip(parts, before, strict=True):
            part.disabled = disabled


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of a model are trained and how many it has, in the format of PEFT. Tied ones count once.

    Args:
        model: any model.
    """
    sizes = [(numel_of(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trained, every = sum(size for size, wanted in sizes if wanted), sum(size for size, _ in sizes)
    print(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / max(every, 1):.4f}")


def collect_router_logits(model: nn.Module) -> dict[str, Tensor]:
    """Collect the router logits of a model's last forward.

    With activation checkpointing, pass `use_reentrant=False` to it: the reentrant variant runs the forward without
    gradients, so that a loss on these logits would train nothing. A warning says so.

    Args:
        model: a model whose layers with experts have `output_router_logits` set. Layers that have not run are skipped.

    Returns:
        the router logits (..., E) by the layers' names in the plain model. If several adapters of a layer kept theirs, their
        keys are "<name of the layer>.<name of the adapter>".

    Example:
        loss = model(...).loss + 0.01 * balance_loss(collect_router_logits(model).values())
    """
    kept = kept_router_logits(model)
    layers = [of_layer.layer for of_layer in kept]
    return {k.layer if layers.count(k.layer) == 1 else f"{k.layer}.{k.adapter}": k.logits for k in kept}


class KeptLogits(NamedTuple):
    """The router logits that one adapter of a layer kept in its last forward."""

    layer: str  # the name in the plain model
    adapter: str
    top_k: int | None
    logits: Tensor  # (..., E)


def kept_router_logits(model: nn.Module) -> list[KeptLogits]:
    """The router logits of a model's last forward. Warn if they lack gradients, see `collect_router_logits`."""
    kept: list[KeptLogits] = []
    without_graph = False
    for name, layer in layers_with_experts(model).items():
        if not (of_layer := layer.kept_router_logits()):
            continue
        mixtures = layer.mixtures()
        for adapter, logits in of_layer.items():
            kept.append(KeptLogits(name, adapter, mixtures[adapter].config.top_k, logits))
            gate = layer.gate(adapter)["gate_weight"]
            is_trained = getattr(layer, "training", False) and gate.requires_grad
            without_graph |= is_trained and not logits.requires_grad
    if without_graph and torch.is_grad_enabled():
        warnings.warn(
            "collect_router_logits: the router logits of layers in training mode have no gradient, so a loss on them trains "
            "nothing. Reentrant activation checkpointing causes this: pass use_reentrant=False.",
            stacklevel=3,
        )
    return kept


def _names(argument: str, names: Any) -> list[str]:
    """The names as a list."""
    several = isinstance(names, Iterable) and not isinstance(names, str)
    listed: list[Any] = list(names) if several else [names]
    if not all(isinstance(name, str) for name in listed):
        fail("apply_lmoe", argument, "be a str or several", repr(names), TypeError)
    return listed


def _is_trained_by_peft(model: nn.Module) -> bool:
    """Whether PEFT has added adapters or prompts to the model, and so has already frozen the other parameters."""
    return any(map(is_of_peft, model.modules()))


def _warn_of_frozen_weights(model: nn.Module, targets: list[str], saved: list[str]) -> None:
    """Warn about stacked experts that match a target but cannot be wrapped, and about heads that are frozen."""

    def is_target(stack: str) -> bool:
        module = stack.rpartition(".")[0]
        return any(t == ALL_LINEAR or target_matches(t, stack) or target_matches(t, module) for t in targets)

    stacks = [stack for stack in stacked_experts(model) if is_target(stack)]
    if stacks:
        shown = ", ".join(map(repr, stacks[:3])) + (", ..." if len(stacks) > 3 else "")
        warnings.warn(
            f"apply_lmoe: {shown} hold the weights of several experts in one parameter, not in linear layers: they are "
            "frozen and get no L-MoE layers.",
            stacklevel=3,
        )
    output = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    trained = (*saved, *saved_modules(model))
    for name, module in heads(model).items():
        is_trained = any(name == other or name.startswith(f"{other}.") for other in trained)
        if output is None and "." not in name and not is_trained and any(True for _ in module.parameters()):
            warnings.warn(
                f"apply_lmoe: the head {name!r} is frozen; if it is newly initialised, pass modules_to_save=[{name!r}].",
                stacklevel=3,
            )
