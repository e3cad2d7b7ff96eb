# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss of a model, balance loss and z-loss of all its layers, for custom training loops and for Trainer."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_kernels.checks import check_finite, fail
from lmoe_kernels.losses import balance_loss, router_z_loss
from lmoe_kernels.model import collect_router_logits
from lmoe_kernels.naming import unwrapped
from lmoe_kernels.targets import lmoe_layers

Mask = Tensor | Mapping[str, Tensor | None] | Callable[[str], Tensor | None] | None

_SIDES = ("encoder", "decoder")
# Cross-attention is part of the decoder, but computes its keys and values from the encoder's tokens.
_CROSS_ATTENTION = re.compile(r"cross|encoder_att|enc_?dec", re.IGNORECASE)
_KEYS_OR_VALUES = re.compile(r"(k|v|kv|key|value)(_proj|_lin)?")
_NONE_KEPT = "none (is output_router_logits set?)"


def auxiliary_loss(model: nn.Module, *, balance: float = 0.01, z: float = 0.0, mask: Mask = None) -> Tensor:
    """Compute the auxiliary loss of a model's last forward: the weighted sum of balance loss and router z-loss.

    Add it to the loss of that forward in training, not in evaluation. With gradient accumulation, divide it by the number
    of micro-batches like the loss itself.

    Semantics:
        of_layer = balance * balance_loss(logits, layer.top_k or 1, mask) + z * router_z_loss(logits, mask)
        loss = mean of of_layer over the layers

    Args:
        model: a model whose L-MoE layers have `output_router_logits` set. Layers that have not run are skipped.
        balance: weight of the balance loss.
        z: weight of the router z-loss.
        mask: which tokens count, as in `balance_loss`. One of: a tensor (B, S) for all layers; a dict {"encoder": (B, S),
            "decoder": (B, U)}, where None means that all tokens count; a function from a layer's name to its mask. With a
            dict, a layer gets the mask of the tokens that it processes. These are recognised by the layer's name, or else
            by the shape of its logits (keys and values of cross-attention are computed from the encoder's tokens).

    Returns:
        a scalar in fp32, or in fp64 if the logits are fp64.

    Raises:
        ValueError: there are no router logits, a mask does not fit a layer, or a layer's mask is ambiguous.
        TypeError: the mask has an unsupported type.

    Example:
        loss = model(ids, attention_mask=mask, labels=ids).loss + auxiliary_loss(model, mask=mask)
    """
    _check_weights("auxiliary_loss", balance, z)
    logits = collect_router_logits(model)
    if not logits:
        fail("auxiliary_loss", "model", "have kept router logits in its last forward", _NONE_KEPT)
    return _mean_over_layers(model, logits, balance, z, mask)


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
        trainer: a Trainer that was created with a model whose L-MoE layers have `output_router_logits` set.
        balance: weight of the balance loss.
        z: weight of the router z-loss.
        mask: a function from the keyword arguments of the model's forward to a mask for `auxiliary_loss`. None uses
            `attention_mask`. In an encoder-decoder model None uses `attention_mask` for the encoder, and for the decoder
            `decoder_attention_mask` or, if that is not given, the tokens whose label is not -100.

    Returns:
        an object whose `remove()` restores the Trainer's own loss.

    Raises:
        ValueError: the Trainer already has an auxiliary loss, creates its model in `train()` (model_init), or has a model
            that keeps no router logits; during training, as `auxiliary_loss`.
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
    _check_weights(op, balance, z)
    if isinstance(trainer.compute_loss, AddedLoss):
        fail(op, "trainer", "have at most one auxiliary loss (remove() the first)", "a second")
    if getattr(trainer, "model_init", None) is not None:
        fail(op, "trainer", "be created with its model", "model_init, which creates another one in train()")
    if not any(layer.output_router_logits for layer in lmoe_layers(model).values()):
        fail(op, "model", "have L-MoE layers that keep router logits", _NONE_KEPT)
    if mask is None:
        two_sides = getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False)
        mask = _masks_of_both_sides if two_sides else _attention_mask
    return AddedLoss(trainer, balance, z, mask)


class AddedLoss:
    """The auxiliary loss of a Trainer. It replaces the Trainer's `compute_loss` until `remove` is called."""

    def __init__(self, trainer: Any, balance: float, z: float, mask: Callable[[Mapping[str, Any]], Mask]) -> None:
        self._trainer, self._compute_loss = trainer, trainer.compute_loss
        self._losses: list[Tensor] = []  # one for each forward, on each replica, since compute_loss was called

        def keep_loss(model: nn.Module, args: Any, batch: dict[str, Any], output: Any) -> None:
            if model.training and torch.is_grad_enabled() and (logits := collect_router_logits(model)):
                self._losses.append(_mean_over_layers(model, logits, balance, z, mask(batch)))

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
            fail("add_auxiliary_loss", "model", "have kept router logits in its last forward", _NONE_KEPT)
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


def _mean_over_layers(model: nn.Module, logits: Mapping[str, Tensor], balance: float, z: float, mask: Mask) -> Tensor:
    """The mean over the layers of their weighted losses, on the first layer's device."""
    if isinstance(mask, Tensor) and set(_SIDES) <= {_side(name) for name in logits}:
        must = "be {'encoder': ..., 'decoder': ...} for a model that has both, or a function of a layer's name"
        fail("auxiliary_loss", "mask", must, "one tensor")
    layers, losses = lmoe_layers(model), []
    for name, of_layer in logits.items():
        tokens = _mask_of_layer(name, of_layer, mask)
        loss = of_layer.new_zeros((), dtype=torch.promote_types(of_layer.dtype, torch.float32))
        if balance:
            loss = loss + balance * balance_loss(of_layer, layers[name].top_k or 1, tokens)
        if z:
            loss = loss + z * router_z_loss(of_layer, tokens)
        losses.append(loss)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _mask_of_layer(name: str, logits: Tensor, mask: Mask) -> Tensor | None:
    """The mask of the tokens that a layer processes, in the shape of its logits."""
    if mask is None or isinstance(mask, Tensor):
        return _reshaped_mask(name, logits, mask)
    if not isinstance(mask, Mapping):
        if not callable(mask):
            must = "be a tensor, {'encoder': ..., 'decoder': ...} or a function of a layer's name"
            fail("auxiliary_loss", "mask", must, type(mask).__name__, TypeError)
        return _reshaped_mask(name, logits, mask(name))
    if set(mask) != set(_SIDES):
        fail("auxiliary_loss", "mask", f"have the keys {list(_SIDES)}", list(mask))
    side = _side(name)
    if side is None:
        fitting = [side for side in _SIDES if _fits(logits, mask[side])]
        if len(fitting) != 1:
            must = f"be a function of a layer's name if the name of a layer (here {name!r}) does not show its tokens"
            fail("auxiliary_loss", "mask", must, "two masks that fit" if fitting else "two masks that do not fit")
        side = fitting[0]
    return _reshaped_mask(name, logits, mask[side])


def _side(name: str) -> str | None:
    """Whether a layer processes the tokens of the "encoder" or of the "decoder", by its name; None if neither is named."""
    parts = name.split(".")
    if any(map(_CROSS_ATTENTION.search, parts)) and _KEYS_OR_VALUES.fullmatch(parts[-1]):
        return "encoder"
    return next((part for part in parts if part in _SIDES), None)


def _fits(logits: Tensor, mask: Tensor | None) -> bool:
    """Whether the mask has one element for each token. Some layers get the tokens of all sequences in one dimension."""
    if mask is None or mask.shape == logits.shape[:-1]:
        return True
    return logits.dim() == 2 and mask.dim() == 2 and mask.numel() == logits.shape[0]


def _reshaped_mask(name: str, logits: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not _fits(logits, mask):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        must = f"have the shape {tuple(logits.shape[:-1])} of the tokens that {name!r} processes"
        fail("auxiliary_loss", "mask", must, got)
    return mask.reshape(logits.shape[:-1])


def _attention_mask(batch: Mapping[str, Any]) -> Mask:
    return batch.get("attention_mask")


def _masks_of_both_sides(batch: Mapping[str, Any]) -> Mask:
    decoder, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
        decoder = labels != -100
    return {"encoder": batch.get("attention_mask"), "decoder": decoder}


def _check_weights(op: str, balance: float, z: float) -> None:
    for name, weight in (("balance", balance), ("z", z)):
        check_finite(op, name, weight, "be a number of at least 0", at_least=0)
