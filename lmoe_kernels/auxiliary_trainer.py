# SPDX-License-Identifier: Apache-2.0
"""Adds the auxiliary loss to the loss of a transformers Trainer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_kernels.auxiliary import NONE_KEPT, Mask, check_weights, loss_of_adapters, mask_of_batch
from lmoe_kernels.auxiliary_hook import adapters_with_coefficients
from lmoe_kernels.checks import fail
from lmoe_kernels.model import kept_router_logits
from lmoe_kernels.targets import layers_with_experts


def add_auxiliary_loss(
    trainer: Any,
    *,
    balance: float = 0.01,
    z: float = 0.0,
    mask: Callable[[Mapping[str, Any]], Mask] | None = None,
) -> "AddedLoss":
    """Add `auxiliary_loss` to the training loss of a transformers Trainer or of a subclass of it.

    Each optimizer step gets the mean over its micro-batches and processes, whether the model or the Trainer scales the
    loss. The logged `loss` includes it. Evaluation and generation do not change: `eval_loss` is the loss of the model.

    Args:
        trainer: a Trainer that was created with a model whose layers with experts have `output_router_logits` set.
        balance: weight of the balance loss.
        z: weight of the router z-loss.
        mask: a function from the keyword arguments of the model's forward to a mask for `auxiliary_loss`. None uses
            `attention_mask`. In an encoder-decoder model None uses `attention_mask` for the encoder, and for the decoder
            `decoder_attention_mask` or, if that is not given, the tokens whose label is not -100. With None, all tokens
            count in a layer that these do not fit, such as a pooler.

    Returns:
        an object whose `remove()` restores the Trainer's own loss.

    Raises:
        ValueError: the Trainer already has an auxiliary loss, creates its model in `train()` (model_init), or has a model
            that keeps no router logits or adds the losses itself; during training, as `auxiliary_loss`.
        TypeError: `trainer` is not a Trainer; during training, as `auxiliary_loss`.

    Example:
        trainer = Trainer(model, args, train_dataset=data)
        add_auxiliary_loss(trainer, balance=0.01)
        trainer.train()
    """
    op = "add_auxiliary_loss"
    model = getattr(trainer, "model", None)
    if not callable(getattr(trainer, "compute_loss", None)) or not isinstance(model, nn.Module):
        fail(op, "trainer", "be a transformers.Trainer with a model", type(trainer).__name__, TypeError)
    check_weights(op, balance, z)
    if isinstance(trainer.compute_loss, AddedLoss):
        fail(op, "trainer", "have at most one auxiliary loss (remove() the first)", "a second")
    if getattr(trainer, "model_init", None) is not None:
        fail(op, "trainer", "be created with its model", "model_init, which creates another one in train()")
    if adapters := adapters_with_coefficients(model):
        got = f"coefficients of the adapter {adapters[0]!r}, which add them: set these to 0"
        fail(op, "model", "have no auxiliary losses of its own", got)
    if not any(
        m.config.output_router_logits for layer in layers_with_experts(model).values() for m in layer.mixtures().values()
    ):
        fail(op, "model", "have L-MoE layers that keep router logits", NONE_KEPT)
    return AddedLoss(trainer, balance, z, mask)


class AddedLoss:
    """The auxiliary loss of a Trainer. It replaces the Trainer's `compute_loss` until `remove` is called."""

    def __init__(self, trainer: Any, balance: float, z: float, mask: Callable[[Mapping[str, Any]], Mask] | None) -> None:
        self._trainer, self._compute_loss = trainer, trainer.compute_loss
        self._losses: list[Tensor] = []  # one for each forward, on each replica, since compute_loss was called

        def keep_loss(model: nn.Module, args: Any, batch: dict[str, Any], output: Any) -> None:
            if model.training and torch.is_grad_enabled() and (kept := kept_router_logits(model)):
                of_batch = mask_of_batch(model, batch) if mask is None else mask(batch)
                self._losses.append(loss_of_adapters(kept, lambda adapter: (balance, z), of_batch))

        # The loss is computed in a forward hook because the masks are arguments of the forward, and because the replicas
        # of DataParallel, with their router logits, exist only until the forward returns.
        self._hook = trainer.model.register_forward_hook(keep_loss, with_kwargs=True)
        trainer.compute_loss = self

    def __call__(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Compute the Trainer's own loss and, in training, add the auxiliary loss."""
        self._losses.clear()
        result = self._compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return result
        if not self._losses:
            fail("add_auxiliary_loss", "model", "have kept router logits in its last forward", NONE_KEPT)
        loss, *outputs = result if return_outputs else (result,)
        auxiliary = torch.stack([of_forward.to(loss.device) for of_forward in self._losses]).mean()
        self._losses.clear()
        if not _trainer_divides(self._trainer, num_items_in_batch):
            auxiliary = auxiliary / self._trainer.current_gradient_accumulation_steps
        return (loss + auxiliary, *outputs) if return_outputs else loss + auxiliary

    def remove(self) -> None:
        """Restore the Trainer's own loss."""
        self._hook.remove()
        if self._trainer.__dict__.get("compute_loss") is self:
            del self._trainer.compute_loss


def _trainer_divides(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether Trainer divides the result of compute_loss by the number of micro-batches; the rule of its `training_step`.

    It does not if the loss is a sum over tokens that is already divided by the number of tokens in all micro-batches.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = by_model or trainer.compute_loss_func is not None
    return not scaled
