# SPDX-License-Identifier: Apache-2.0
"""Balances the use of experts without a loss: moves the bias of `choice_bias=True` by the load of the experts."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from lmoe_kernels.checks import check_finite, fail
from lmoe_kernels.targets import layers_with_experts


def balance_experts(model: nn.Module, speed: float = 1e-3) -> None:
    """Move the bias of the choice of each layer towards equal use of its experts, once after each optimizer step.

    Semantics:
        load[e] = number of tokens that chose expert e in training since the last call, over all processes
        choice_bias += speed * sign(load.mean() - load);  load = 0

    The bias takes part in the choice of `top_k` alone, so a token's gates are those of its chosen experts without it. A
    layer that got no tokens does not change. Activation checkpointing counts each token twice, which changes no sign. In
    evaluation nothing is counted. With several processes, all must call this function, and micro-batches before the last one
    of a step must run in `no_sync()` of DistributedDataParallel, as Trainer and Accelerate do, because it would otherwise
    replace the counts of the other processes by those of the first.

    Args:
        model: a model whose layers have `choice_bias=True`, plain or wrapped.
        speed: how far a bias moves in one call, in units of the router logits.

    Raises:
        ValueError: no layer of the model has a choice_bias, FSDP has sharded it, or speed is negative or not finite.
        TypeError: speed is not a number.

    Example:
        apply_lmoe(model, "all-linear", num_experts=16, top_k=2, choice_bias=True)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            balance_experts(model)

    Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664.
    """
    _check_speed("balance_experts", speed)
    counted = _biases_and_loads("balance_experts", model)
    totals = _summed([load for _, load in counted])
    with torch.no_grad():
        for (bias, load), total in zip(counted, totals, strict=True):
            bias.add_(torch.sign(total.mean() - total), alpha=speed)
            load.zero_()


def balance_callback(speed: float = 1e-3) -> Any:
    """Create a callback for transformers' Trainer that calls `balance_experts` after each optimizer step.

    Args:
        speed: see `balance_experts`.

    Returns:
        a `transformers.TrainerCallback`. At the start of the training it raises ValueError if no layer has a choice_bias.

    Raises:
        ImportError: transformers is not installed.
        ValueError: speed is negative or not finite.
        TypeError: speed is not a number.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[balance_callback()])
    """
    from transformers import TrainerCallback  # an optional package, which the import of this one must not load

    _check_speed("balance_callback", speed)

    class BalanceCallback(TrainerCallback):
        """Calls `balance_experts` after each optimizer step, not after each micro-batch."""

        def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **rest: Any) -> None:
            _biases_and_loads("balance_callback", model)

        def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **rest: Any) -> None:
            balance_experts(model, speed)

    return BalanceCallback()


def _check_speed(op: str, speed: float) -> None:
    check_finite(op, "speed", speed, "be a number of at least 0", at_least=0)


def _biases_and_loads(op: str, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The bias of the choice and the load of every mixture that has them."""
    found = [
        (layer.mixtures()[adapter].tensors["choice_bias"], load)
        for layer in layers_with_experts(model).values()
        for adapter, load in layer.loads().items()
    ]
    if not found:
        fail(op, "model", "have layers with choice_bias=True", "none")
    if any(hasattr(bias, "full_tensor") or hasattr(bias, "_fsdp_flattened") for bias, _ in found):
        must = "be whole in every process, so leave it out of FSDP (ignored_params) with the adapter of PEFT"
        fail(op, "choice_bias", must, "a sharded parameter")
    return found


def _summed(loads: list[Tensor]) -> list[Tensor]:
    """The loads over all processes, summed in one message for each device."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return loads
    totals: dict[int, Tensor] = {}
    for device in dict.fromkeys(load.device for load in loads):
        here = [load for load in loads if load.device == device]
        flat = torch.cat(here)
        distributed.all_reduce(flat)
        totals |= {id(load): total for load, total in zip(here, flat.split([len(load) for load in here]), strict=True)}
    return [totals[id(load)] for load in loads]
