# SPDX-License-Identifier: Apache-2.0
"""What an optimizer trains: parameter groups for experts and gates, and frozen gates and experts."""

from typing import Any

from torch import nn

from lmoe_kernels.checks import check_finite, fail
from lmoe_kernels.distributed import is_sharded
from lmoe_kernels.frozen_experts import frozen_experts_of
from lmoe_kernels.mixture import LayerWithExperts
from lmoe_kernels.targets import layers_with_experts, nearest


def parameter_groups(
    model: nn.Module, *, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Divide the trained parameters of a model into groups for an optimizer of torch: experts, gates, and all others.

    Weight decay would pull the gates towards equal use of the experts, so they have none; nor have biases and norms. Only
    parameters that require a gradient are in the groups, each once, and groups without parameters are left out.

    Args:
        model: a model with layers of experts, plain or wrapped, before or after DDP and fully_shard.
        lr: the learning rate.
        gate_lr: the learning rate of the gates; None for lr.
        weight_decay: of the experts and of other parameters with two or more dimensions.

    Returns:
        a list of {"params": ..., "lr": ..., "weight_decay": ...}: of the experts, of the gates, of the other parameters
        with weight decay, of those without.

    Raises:
        ValueError: no parameter requires a gradient, or a number is negative or not finite.
        TypeError: a number has the wrong type.

    Example:
        groups = parameter_groups(model, lr=1e-3, gate_lr=1e-2, weight_decay=0.01)
        trainer = Trainer(model, args, train_dataset=data, optimizers=(torch.optim.AdamW(groups), None))
    """
    op = "parameter_groups"
    numbers = {"lr": lr, "gate_lr": lr if gate_lr is None else gate_lr, "weight_decay": weight_decay}
    for name, number in numbers.items():
        check_finite(op, name, number, "be a number of at least 0", at_least=0)
    kinds: dict[int, str] = {}
    for layer in layers_with_experts(model).values():
        for adapter, mixture in layer.mixtures().items():
            kinds |= {id(tensor): "experts" for tensor in mixture.tensors.values()}
            kinds |= {id(tensor): "gates" for tensor in layer.gate(adapter).values()}
    of_kind: dict[str, list[nn.Parameter]] = {"experts": [], "gates": [], "others": [], "biases and norms": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = kinds.get(id(parameter), "others" if parameter.dim() > 1 else "biases and norms")
            of_kind[kind].append(parameter)
    if not any(of_kind.values()):
        fail(op, "model", "have parameters that require a gradient", "none")
    decayed = ("experts", "others")
    return [
        {
            "params": parameters,
            "lr": numbers["gate_lr"] if kind == "gates" else lr,
            "weight_decay": weight_decay if kind in decayed else 0.0,
        }
        for kind, parameters in of_kind.items()
        if parameters
    ]


def freeze_gates(model: nn.Module, frozen: bool = True) -> None:
    """Freeze the gates of all layers, shared routers included, or train them again. The experts stay as they are.

    It sets `requires_grad` of the gates' weights and biases, so call it before the optimizer is created. Checkpoints do not
    contain it. In a model of PEFT the gates of the active adapters are meant; its `set_adapter` makes them trainable again.

    Args:
        model: a model with layers of experts, plain or wrapped.
        frozen: False to train the gates again.

    Raises:
        ValueError: the model has no layers with experts.

    Example:
        freeze_gates(model)  # the experts learn at fixed gates
    """
    for layer in _layers("freeze_gates", model).values():
        for adapter in layer.active():
            for tensor in layer.gate(adapter).values():
                tensor.requires_grad_(not frozen)


def freeze_expert(model: nn.Module, name: str, frozen: bool = True, *, adapter: str | None = None) -> None:
    """Freeze one expert in all layers that have it, or train it again. The others and the gates stay trained.

    The experts of a layer share one parameter. So the gradients of the rows of a frozen expert are set to zero, before the
    gradient norm is clipped, and each step of an optimizer of torch leaves these rows as they were, bit for bit, in spite of
    weight decay and momentum. With shared_a, only B is frozen, because all experts share A. The gate may still move tokens
    to or from the expert, see `freeze_gates`.

    It can be called at any time, also with DDP, and holds for copies of the model. Like `requires_grad` it is not saved.

    Args:
        model: a model with layers of experts, plain or wrapped.
        name: the name of the expert, see `expert_names` of `LMoELinear`: "0", "1" and so on if they were not named.
        frozen: False to train the expert again.
        adapter: the adapter of PEFT; None for all that have an expert of this name.

    Raises:
        ValueError: no layer has an expert or an adapter of this name, or the model is sharded (FSDP); later, in a step of an
            optimizer, if the model was sharded in the meantime.

    Example:
        freeze_expert(model, "0")
    """
    op = "freeze_expert"
    layers = _layers(op, model)
    if is_sharded(model):
        fail(op, "model", "not be sharded, because a process holds only parts of the experts", "a model of FSDP")
    mixtures = [(layer, key, m) for layer in layers.values() for key, m in layer.mixtures().items()]
    adapters = list(dict.fromkeys(key for _, key, _ in mixtures))
    if adapter is not None and adapter not in adapters:
        fail(op, "adapter", "be an adapter of the model", f"{adapter!r}; {nearest(adapter, adapters)}")
    chosen = [(layer, key, m) for layer, key, m in mixtures if adapter in (None, key)]
    found = [(layer, key) for layer, key, m in chosen if name in m.config.names()]
    if not found:
        known = dict.fromkeys(name for _, _, m in chosen for name in m.config.names())
        fail(op, "name", "be the name of an expert", f"{name!r}; {nearest(str(name), known)}")
    for layer, key in found:
        frozen_experts_of(layer).freeze(key, name, frozen)


def _layers(op: str, model: nn.Module) -> dict[str, LayerWithExperts]:
    layers = layers_with_experts(model)
    if not layers:
        fail(op, "model", "have layers with experts (see apply_lmoe)", "none")
    return layers
