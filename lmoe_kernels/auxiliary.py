# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss of a model: the balance loss and the z-loss of all its layers, each on the tokens of its mask."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmoe_kernels.checks import check_finite, fail
from lmoe_kernels.losses import balance_loss, router_z_loss
from lmoe_kernels.model import KeptLogits, kept_router_logits
from lmoe_kernels.naming import unwrapped
from lmoe_kernels.router_scopes import reads_encoder

Weights = tuple[float, float]  # of the balance loss and of the z-loss
Mask = Tensor | Mapping[str, Tensor | None] | Callable[[str], Tensor | None] | None

_SIDES = ("encoder", "decoder")
NONE_KEPT = "none (is output_router_logits set?)"


class MaskOfBatch(NamedTuple):
    """The masks of a batch of a transformers model. A layer that they do not fit, such as a pooler, gets none."""

    encoder: Tensor | None
    decoder: Tensor | None  # the same mask as for the encoder in a model that is not of both

    def of_layer(self, name: str, logits: Tensor) -> Tensor | None:
        """The mask of the tokens that a layer processes; None if all tokens count."""
        side = _side(name)
        masks = [self.encoder, self.decoder] if side is None else [self.encoder if side == "encoder" else self.decoder]
        fitting = [mask for mask in masks if mask is None or _fits(logits, mask)]
        return None if any(mask is not fitting[0] for mask in fitting) or not fitting else fitting[0]


def auxiliary_loss(model: nn.Module, *, balance: float = 0.01, z: float = 0.0, mask: Mask = None) -> Tensor:
    """Compute the auxiliary loss of a model's last forward: the weighted sum of balance loss and router z-loss.

    Add it to the loss of that forward in training, not in evaluation. With gradient accumulation, divide it by the number
    of micro-batches like the loss itself.

    Semantics:
        of_layer = balance * balance_loss(logits, layer.top_k or 1, mask) + z * router_z_loss(logits, mask)
        loss = mean of of_layer over the layers  # with several adapters: the sum of their means

    Args:
        model: a model whose layers with experts have `output_router_logits` set. Layers that have not run are skipped.
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
    check_weights("auxiliary_loss", balance, z)
    kept = kept_router_logits(model)
    if not kept:
        fail("auxiliary_loss", "model", "have kept router logits in its last forward", NONE_KEPT)
    return loss_of_adapters(kept, lambda adapter: (balance, z), mask)


def loss_of_adapters(kept: Iterable[KeptLogits], weights_of: Callable[[str], Weights], mask: Mask | MaskOfBatch) -> Tensor:
    """The sum over the adapters of the mean over their layers of the weighted losses, on the first layer's device."""
    by_adapter: dict[str, list[KeptLogits]] = {}
    for of_layer in kept:
        by_adapter.setdefault(of_layer.adapter, []).append(of_layer)
    losses = [_mean_over_layers(layers, weights_of(adapter), mask) for adapter, layers in by_adapter.items()]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _mean_over_layers(kept: list[KeptLogits], weights: Weights, mask: Mask | MaskOfBatch) -> Tensor:
    """The mean over the layers of their weighted losses, on the first layer's device."""
    if isinstance(mask, Tensor) and set(_SIDES) <= {_side(of_layer.layer) for of_layer in kept}:
        must = "be {'encoder': ..., 'decoder': ...} for a model that has both, or a function of a layer's name"
        fail("auxiliary_loss", "mask", must, "one tensor")
    (balance, z), losses = weights, []
    for name, _, top_k, logits in kept:
        tokens = _mask_of_layer(name, logits, mask)
        loss = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        if balance:
            loss = loss + balance * balance_loss(logits, top_k or 1, tokens)
        if z:
            loss = loss + z * router_z_loss(logits, tokens)
        losses.append(loss)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _mask_of_layer(name: str, logits: Tensor, mask: Mask | MaskOfBatch) -> Tensor | None:
    """The mask of the tokens that a layer processes, in the shape of its logits."""
    if isinstance(mask, MaskOfBatch):
        return _reshaped_mask(name, logits, mask.of_layer(name, logits))
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
    if reads_encoder(name):
        return "encoder"
    return next((part for part in name.split(".") if part in _SIDES), None)


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


def mask_of_batch(model: nn.Module, batch: Mapping[str, Any]) -> MaskOfBatch:
    """Find the masks among the keyword arguments of a transformers model's forward."""
    mask, decoder, labels = batch.get("attention_mask"), batch.get("decoder_attention_mask"), batch.get("labels")
    if not getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        return MaskOfBatch(mask, mask)
    if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
        decoder = labels != -100
    return MaskOfBatch(mask, decoder)


def check_weights(op: str, balance: float, z: float) -> None:
    """Check the weights of the two losses."""
    for name, weight in (("balance", balance), ("z", z)):
        check_finite(op, name, weight, "be a number of at least 0", at_least=0)
