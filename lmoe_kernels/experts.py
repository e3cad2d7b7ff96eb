# SPDX-License-Identifier: Apache-2.0
"""Named experts: list, add, remove and export the experts of a model whose layers have them."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.distributed import how_distributed, is_sharded, lacks_fsdp1_wrapper
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.lora_adapter import LoraAdapter, LoraLayer, check_fits, expert_of, lora_of, read_lora, write_lora
from lmoe_kernels.mixture import LayerWithExperts, Mixture
from lmoe_kernels.naming import unwrapped
from lmoe_kernels.routers import Router
from lmoe_kernels.targets import layers_with_experts, nearest

# The default gate_bias of `add_expert`. With a lower one the gate may not rise. Of ten runs of Adam, five at learning rate
# 1e-2 and five at 3e-3, the gate rose in ten at -4 (after 120 steps at most), in nine at -5 (525) and in three at -6 (390);
# outputs changed by at most 0.5 %, 0.2 % and 0.1 %. (Three trained experts and tokens of a fourth kind, mixing="outputs",
# 64 features, rank 4; Xeon, 2 cores, 2026-11-26.)
LOW_GATE = -4.0

_Mixtures = dict[str, tuple[LayerWithExperts, Mixture]]  # by the layers' names in the plain model


def expert_names(model: nn.Module, *, adapter: str | None = None) -> list[str]:
    """List the names of a model's experts. Experts that were not named have their numbers as names, "0" and so on.

    Args:
        model: a model with L-MoE layers, plain or wrapped.
        adapter: the name of the adapter, in a model of PEFT that has several; None for the active one.

    Returns:
        the names in the order of the experts; if the layers have different experts, the names of all of them.

    Raises:
        ValueError: the model has no L-MoE layers, or no adapter of that name.
    """
    return _names(_mixtures("expert_names", model, adapter)[1])


def add_expert(
    model: nn.Module,
    name: str,
    *,
    lora: str | os.PathLike[str] | None = None,
    gate_bias: float = LOW_GATE,
    adapter: str | None = None,
) -> None:
    """Add one expert to every L-MoE layer of a model. Its gate starts so low that the outputs hardly change.

    The new expert starts like a LoRA (A random, B zero), or as a LoRA that PEFT has saved. For every input its gate g is at
    most exp(gate_bias), by default 0.018. Under mixing="outputs" the delta of the other experts shrinks by the factor 1 - g,
    and g times that of the new expert is added; under "factors" the change is about twice as large. Adam divides the
    gradients of a small gate by their own size, so the gate rises from there; for plain SGD pass a higher gate_bias.

    With top_k the new expert is not among the k largest: it changes nothing, and a loss on the output does not train it.
    Pass a higher gate_bias, or use `choice_bias`, with which `balance_experts` makes tokens choose it. Layers without a
    `gate_bias` get one, and so do shared routers. Parameters are replaced by larger ones: create the optimizer anew. An
    error leaves the model unchanged.

    Args:
        model: a model with L-MoE layers, plain or wrapped.
        name: the name of the new expert.
        lora: a directory with a plain LoRA of PEFT. Where the expert's gate is 1, it gives what the LoRA gives. Layers and
            ranks that the LoRA does not have are zero. Its scaling becomes a factor of B, which is rounded once.
        gate_bias: the logarithm of the largest gate that the new expert may have at the start.
        adapter: see `expert_names`.

    Raises:
        ValueError: there is an expert of that name, the LoRA does not fit the layers or has a larger rank than they, a LoRA
            is given for layers whose experts share one A, the model has no L-MoE layers, or it is distributed (DDP, FSDP).
        TypeError: an argument has the wrong type.
        FileNotFoundError: a file of the LoRA is missing.

    Example:
        add_expert(model, "code")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    """
    op = "add_expert"
    _check_name(op, name)
    checks.check_finite(op, "gate_bias", gate_bias, "be a finite number")
    adapter, mixtures = _changeable(op, model, adapter)
    if name in (known := _names(mixtures)):
        checks.fail(op, "name", "be a new one", f"{name!r}, which the model has: {', '.join(map(repr, known))}")
    loras = _loras_for(op, mixtures, lora)
    extended = {
        layer_name: _with_expert(mixture, name, loras.get(layer_name) if lora is not None else None, gate_bias, lora is None)
        for layer_name, (_, mixture) in mixtures.items()
    }
    gates = [(router, _gate_with_expert(router.gate(), gate_bias)) for router in _routers(mixtures)]
    for layer_name, mixture in extended.items():
        mixtures[layer_name][0].set_mixture(adapter, mixture)
    for router, gate in gates:
        router.set_gate(**gate)


def remove_expert(model: nn.Module, name: str, *, adapter: str | None = None) -> None:
    """Remove an expert from all L-MoE layers of a model. The gates of the others then share what it had.

    Parameters are replaced by smaller ones: create the optimizer anew. An error leaves the model unchanged. A checkpoint
    that contains the expert no longer fits the model.

    Args:
        model: a model with L-MoE layers, plain or wrapped.
        name: the name of the expert.
        adapter: see `expert_names`.

    Raises:
        ValueError: there is no expert of that name, it is the last one of a layer, top_k would exceed the number of experts,
            the model has no L-MoE layers, or it is distributed (DDP, FSDP).
        TypeError: the name is not a str.
    """
    op = "remove_expert"
    _check_name(op, name)
    adapter, mixtures = _changeable(op, model, adapter)
    having = _having(op, mixtures, name)
    for layer_name, (_, mixture) in having.items():
        left = mixture.config.num_experts - 1
        if left < (needed := mixture.config.top_k or 1):
            must = "leave an expert" if needed == 1 else f"leave as many experts as top_k = {needed}"
            checks.fail(op, "name", f"{must} in every layer", f"{name!r}, after which {left} are left in {layer_name!r}")
    smaller = {key: _without_expert(mixture, name) for key, (_, mixture) in having.items()}
    gates = {router: names.index(name) for router, names in _routers(having).items()}
    for layer_name, mixture in smaller.items():
        having[layer_name][0].set_mixture(adapter, mixture)
    for router, number in gates.items():
        kept = [i for i in range(router.num_experts) if i != number]
        router.set_gate(**{key: _rows(parameter, kept) for key, parameter in router.gate().items()})


def export_expert(model: nn.Module, name: str, directory: str | os.PathLike[str], *, adapter: str | None = None) -> None:
    """Write an expert as a plain LoRA, which `peft.PeftModel.from_pretrained` loads.

    Up to rounding, the LoRA computes what the model computes where the gate of this expert is 1. Layers and ranks in which
    the expert is zero are left out, so that an imported LoRA gets its own rank back. Neither the gate nor `modules_to_save`
    are written.

    Args:
        model: a model with L-MoE layers, plain or wrapped.
        name: the name of the expert.
        directory: the directory to write to. It is created if it does not exist.
        adapter: see `expert_names`.

    Raises:
        ValueError: there is no expert of that name, the model has no L-MoE layers, is on the meta device, or is sharded
            (FSDP): load its checkpoint into a plain model.
        TypeError: the name is not a str.
        ImportError: safetensors is not installed.
    """
    op = "export_expert"
    _check_name(op, name)
    if is_sharded(model) or lacks_fsdp1_wrapper(model):
        checks.fail(op, "model", "not be sharded", "one that is: load its checkpoint into a plain model")
    mixtures = _with_data(op, model, adapter)[1]
    experts = {key: _expert(mixture, name) for key, (_, mixture) in _having(op, mixtures, name).items()}
    layers = {key: lora_of(*expert) for key, expert in experts.items()}
    used = {key: layer for key, layer in layers.items() if layer is not None}
    if not used:  # an expert that is zero everywhere must still be a LoRA that PEFT loads
        used = {key: LoraLayer(a, b.T, scaling) for key, (a, b, scaling) in experts.items()}
    base = getattr(unwrapped(model), "name_or_path", None)
    write_lora(op, directory, LoraAdapter(used, base if isinstance(base, str) and base else None))


def _mixtures(op: str, model: nn.Module, adapter: str | None) -> tuple[str, _Mixtures]:
    """The name of the adapter and its mixtures. Without a name, it is the only adapter or the active one."""
    layers = layers_with_experts(model)
    all_mixtures = {name: layer.mixtures() for name, layer in layers.items()}
    known = list(dict.fromkeys(key for mixtures in all_mixtures.values() for key in mixtures))
    if not known:
        checks.fail(op, "model", "have L-MoE layers (see apply_lmoe)", "none")
    shown = ", ".join(map(repr, known))
    if adapter is None:
        active = {key for layer in layers.values() for key in layer.active()}
        if len(known) > 1 and len(active) != 1:
            checks.fail(op, "adapter", "be given for a model of several adapters", f"None; the adapters are {shown}")
        adapter = known[0] if len(known) == 1 else str(next(iter(active)))
    elif adapter not in known:
        checks.fail(op, "adapter", f"be one of {shown}", repr(adapter))
    return adapter, {name: (layers[name], found[adapter]) for name, found in all_mixtures.items() if adapter in found}


def _changeable(op: str, model: nn.Module, adapter: str | None) -> tuple[str, _Mixtures]:
    """The mixtures of an adapter in a model that is not distributed."""
    if (how := how_distributed(model)) is not None:
        checks.fail(op, "model", "not be distributed", f"one {how}")
    return _with_data(op, model, adapter)


def _with_data(op: str, model: nn.Module, adapter: str | None) -> tuple[str, _Mixtures]:
    """The mixtures of an adapter, none of which may be on the meta device."""
    adapter, mixtures = _mixtures(op, model, adapter)
    for name, (_, mixture) in mixtures.items():
        if any(tensor.is_meta for tensor in mixture.tensors.values()):
            checks.fail(op, "model", "have data", f"layer {name!r} on the meta device")
    return adapter, mixtures


def _check_name(op: str, name: str) -> None:
    if not isinstance(name, str) or not name:
        checks.fail(op, "name", "be a str that is not empty", repr(name), TypeError if name != "" else ValueError)


def _names(mixtures: _Mixtures) -> list[str]:
    return list(dict.fromkeys(name for _, mixture in mixtures.values() for name in mixture.config.names()))


def _having(op: str, mixtures: _Mixtures, name: str) -> _Mixtures:
    """The mixtures that have an expert of this name; at least one must."""
    having = {key: pair for key, pair in mixtures.items() if name in pair[1].config.names()}
    if not having:
        checks.fail(op, "name", "be that of an expert of the model", f"{name!r}; {nearest(name, _names(mixtures))}")
    return having


def _loras_for(op: str, mixtures: _Mixtures, directory: str | os.PathLike[str] | None) -> dict[str, LoraLayer]:
    """Read a LoRA and check that it fits the layers."""
    if directory is None:
        return {}
    loras = read_lora(op, directory).layers
    for name, lora in loras.items():
        if name not in mixtures:
            got = f"the LoRA of a layer {name!r} without experts; {nearest(name, mixtures)}"
            checks.fail(op, f"{directory}", "fit the model's L-MoE layers", got)
        config, tensors = mixtures[name][1]
        where = f"of layer {name!r} in {directory}"
        check_fits(op, where, lora, tensors["lora_a"].shape[2], tensors["lora_b"].shape[2])
        if lora.a.shape[0] > config.rank:
            checks.fail(op, f"the LoRA {where}", f"have at most the layer's rank {config.rank}", lora.a.shape[0])
        if config.shared_a:
            checks.fail(op, "lora", "be None in layers whose experts share one A", f"{directory}")
        if _scaling(config) == 0:
            checks.fail(op, "lora", "be None in layers with alpha = 0", f"{directory}")
    return loras


def _with_expert(mixture: Mixture, name: str, lora: LoraLayer | None, gate_bias: float, random: bool) -> Mixture:
    """The mixture with one more expert: the LoRA, or one of zeros, whose A is random if `random` is set."""
    config, tensors = mixture
    a, b = tensors["lora_a"], tensors["lora_b"]
    new_a, new_b = torch.zeros_like(a[:1]), torch.zeros_like(b[:1])
    if random:
        bound = a.shape[2] ** -0.5 if a.shape[2] else 0.0  # as in a new layer
        nn.init.uniform_(new_a, -bound, bound)
    elif lora is not None:
        of_lora = expert_of(lora, config.rank, _scaling(config), a.dtype)
        new_a[0].copy_(of_lora[0])
        new_b[0].copy_(of_lora[1])
    changed = {"lora_a": a if config.shared_a else _extended(a, new_a), "lora_b": _extended(b, new_b)}
    if config.own_gate:
        changed |= _gate_with_expert(tensors, gate_bias)
    if config.choice_bias:
        of_choice = tensors["choice_bias"]
        changed["choice_bias"] = torch.cat([of_choice, of_choice.mean(dim=0, keepdim=True)])
    return Mixture(_of_experts(config, [*config.names(), name])._replace(gate_bias=True), changed)


def _without_expert(mixture: Mixture, name: str) -> Mixture:
    config, tensors = mixture
    names = config.names()
    kept = [i for i, other in enumerate(names) if other != name]

    def of_kept(key: str, tensor: Tensor) -> Tensor:
        if key == "lora_a" and config.shared_a:
            return tensor
        return _rows(tensor, kept) if isinstance(tensor, nn.Parameter) else tensor[kept]

    changed = {key: of_kept(key, tensor) for key, tensor in tensors.items()}
    return Mixture(_of_experts(config, [names[i] for i in kept]), changed)


def _gate_with_expert(gate: Mapping[str, Tensor], logarithm: float) -> dict[str, nn.Parameter]:
    """The weight and the bias of a gate with one more expert, see `_low_gate`."""
    weight, bias = gate["gate_weight"], gate.get("gate_bias")
    if bias is None:
        bias = torch.zeros_like(weight[:, 0]).requires_grad_(weight.requires_grad)
    row, lowest = _low_gate(weight, bias, logarithm)
    return {"gate_weight": _extended(weight, row), "gate_bias": _extended(bias, lowest)}


def _routers(mixtures: _Mixtures) -> dict[Router, tuple[str, ...]]:
    """The routers that these mixtures share, each once, and the names of its experts, which are those of its layers."""
    return {
        router: mixture.config.names()
        for layer, mixture in mixtures.values()
        if isinstance(layer, LMoELinear) and (router := layer.shared_router()) is not None
    }


def _of_experts(config: LayerConfig, names: list[str]) -> LayerConfig:
    """The options for experts of these names. An alpha that depends on the number of experts keeps its value."""
    alpha = config.default_alpha() if config.alpha is None else config.alpha
    return config._replace(num_experts=len(names), expert_names=names, alpha=alpha)


def _scaling(config: LayerConfig) -> float:
    return (config.default_alpha() if config.alpha is None else config.alpha) / config.rank


def _expert(mixture: Mixture, name: str) -> tuple[Tensor, Tensor, float]:
    """The A (R, I) and the B (R, O) of an expert, and the layer's scaling."""
    config, tensors = mixture
    index = config.names().index(name)
    a, b = tensors["lora_a"].detach(), tensors["lora_b"].detach()
    return a[0 if config.shared_a else index], b[index], _scaling(config)


def _low_gate(gate_weight: Tensor, gate_bias: Tensor, logarithm: float) -> tuple[Tensor, Tensor]:
    """The weights (1, I) and the bias (1) of a further gate that is at most exp(logarithm), for every input.

    The logarithm of a sum of exponentials is at least the mean of the exponents under any weights p, plus the entropy of p.
    With p = softmax(gate_bias) the bias's part of that is the logarithm of the sum of exp(gate_bias), so that experts with a
    low bias count little.
    """
    wide = torch.promote_types(gate_weight.dtype, torch.float32)
    bias = gate_bias.detach().to(wide)
    row = bias.softmax(dim=0) @ gate_weight.detach().to(wide)
    return row[None].to(gate_weight.dtype), (bias.logsumexp(dim=0, keepdim=True) + logarithm).to(gate_bias.dtype)


def _rows(parameter: Tensor, numbers: list[int]) -> nn.Parameter:
    """A parameter of these rows of another one."""
    return nn.Parameter(parameter.detach()[numbers], parameter.requires_grad)


def _extended(tensor: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([tensor.detach(), rows.detach()]), requires_grad=tensor.requires_grad)
