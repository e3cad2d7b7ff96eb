# SPDX-License-Identifier: Apache-2.0
"""Adds the auxiliary losses to the loss that a transformers model returns, weighted by the coefficients of its adapters.

So a Trainer needs no subclass and no call. The loss of a micro-batch gets the weight that its label tokens have in the loss
of the model:

- The model gets `num_items_in_batch`, the number of label tokens of a whole optimizer step: the weight is the share of the
  micro-batch in it. The weights of a step sum to 1, over the processes too.
- It does not get it, because it accepts no such argument or because the training loop passes none: the weight is 1, and
  the loop divides the loss by the number of micro-batches.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_kernels.auxiliary import Weights, loss_of_adapters, mask_of_batch
from lmoe_kernels.model import kept_router_logits
from lmoe_kernels.targets import layers_with_experts


def install(model: nn.Module, coefficients: Callable[[str], Weights]) -> None:
    """Let a transformers model add the auxiliary losses to its loss, in training with gradients. A second call replaces.

    Nothing changes in evaluation, without labels, and for layers that keep no router logits.

    Args:
        model: the transformers model itself, which returns the loss; not a wrapper around it.
        coefficients: a function from the name of an adapter to its weights of balance loss and z-loss.
    """
    for hook in model._forward_hooks.values():
        if isinstance(hook, _AddLosses):
            hook.coefficients = coefficients
            return
    model.register_forward_hook(_AddLosses(coefficients), with_kwargs=True)


def adapters_with_coefficients(model: nn.Module) -> list[str]:
    """The names of the adapters whose auxiliary losses a model already adds to its loss."""
    hooks = [hook for part in model.modules() for hook in part._forward_hooks.values() if isinstance(hook, _AddLosses)]
    names = dict.fromkeys(adapter for layer in layers_with_experts(model).values() for adapter in layer.mixtures())
    return [name for name in names if any(any(hook.coefficients(name)) for hook in hooks)]


class _AddLosses:
    """The forward hook that `install` registers."""

    def __init__(self, coefficients: Callable[[str], Weights]) -> None:
        self.coefficients = coefficients
        self._warned = False

    def __call__(self, model: nn.Module, args: Any, batch: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        kept = [of_layer for of_layer in kept_router_logits(model) if any(self.coefficients(of_layer.adapter))]
        if not kept:
            return None
        if not _has_loss(model, output):
            self._warn_once()
            return None
        added = loss_of_adapters(kept, self.coefficients, mask_of_batch(model, batch))
        return _with_loss(output, added, _share_of_step(model, batch))

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "LMoEConfig: router_aux_loss_coef and router_z_loss_coef add nothing, because the training loop ignores "
                "the loss that the model returns: set both to 0, keep the router logits with output_router_logits=True, and "
                "call add_auxiliary_loss(trainer), or add auxiliary_loss(model) to your loss.",
                stacklevel=3,
            )


def _has_loss(model: nn.Module, output: Any) -> bool:
    """Whether a training loop uses the loss in this output."""
    if not isinstance(output, dict):  # a tuple starts with the loss, if there is one
        return isinstance(output, tuple) and len(output) > 0 and isinstance(output[0], Tensor) and output[0].dim() == 0
    if _is_of_trl(output):  # of the Trainers of TRL, SFTTrainer alone sums log_probs up to its loss
        return (getattr(model, "model_tags", None) or [""])[-1] == "sft"
    return isinstance(output.get("loss"), Tensor)


def _is_of_trl(output: Mapping[str, Any]) -> bool:
    """Whether the loss will be computed from log_probs, as by TRL, which gives models a forward that returns these."""
    return all(isinstance(output.get(name), Tensor) for name in ("log_probs", "label_mask"))


def _with_loss(output: Any, added: Tensor, share: Tensor | float) -> Any:
    """The output with the loss added."""

    def with_added(loss: Tensor) -> Tensor:
        return loss + (added * share).to(loss.device, loss.dtype).reshape(loss.shape)

    if isinstance(output, tuple):
        return (with_added(output[0]), *output[1:])
    if isinstance(output.get("loss"), Tensor):
        output["loss"] = with_added(output["loss"])
    if _is_of_trl(output):
        # SFTTrainer sums these over the label tokens and divides by their number in the whole optimizer step, so the same
        # share results if the loss is added to each. Only its gradient is: other uses of log_probs keep their values.
        log_probs = output["log_probs"]
        gradient = (added - added.detach()).to(log_probs.device, log_probs.dtype)
        output["log_probs"] = log_probs - gradient * output["label_mask"]
    return output


def _share_of_step(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | float:
    """The share of a micro-batch in the label tokens of its optimizer step; 1 if their number is not given."""
    total, labels = batch.get("num_items_in_batch"), batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and _shifts_labels(model):
            labels = labels[..., 1:]
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    counted = labels.ne(-100).sum()
    return counted / (total.to(counted.device) if isinstance(total, Tensor) else total)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the loss of a transformers model compares each token with the label of the next one."""
    if not hasattr(model, "loss_type") or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(str(model.loss_type)) is ForCausalLMLoss
