"""Small steps of transformers' Trainer that several test files take: data, arguments, what a step saw, loss functions."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration, TrainerCallback, TrainingArguments

from lmoe_kernels import apply_lmoe


def rows(count: int) -> list[dict[str, Tensor]]:
    """Rows of 8 tokens, of which the first 3 to 8 count."""
    result = []
    for _ in range(count):
        tokens = torch.arange(8) < torch.randint(3, 9, ())
        ids = torch.randint(0, 32, (8,)).where(tokens, 0)
        result.append({"input_ids": ids, "attention_mask": tokens.long(), "labels": ids.where(tokens, -100)})
    return result


def arguments(folder: Path, **options) -> TrainingArguments:
    options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "save_strategy": "no", **options}
    options.setdefault("per_device_train_batch_size", 2)
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, per_device_eval_batch_size=2,
        **options,
    )  # fmt: skip


class Recorder(TrainerCallback):
    """Records the gradients of the last step and its batches."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.gradients: dict[str, Tensor] = {}
        self.hook = model.register_forward_pre_hook(self._batch, with_kwargs=True)

    def _batch(self, model: nn.Module, args: tuple, batch: dict) -> None:
        if model.training:
            self.batches.append(batch)

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module, **kwargs) -> None:
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class WithoutLossArguments(LlamaForCausalLM):
    """Its loss is a mean over the batch, which Trainer divides by the number of micro-batches."""

    accepts_loss_kwargs = False


def summed_loss(outputs, labels: Tensor, num_items_in_batch) -> Tensor:
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(outputs.logits.flatten(0, 1), shifted.flatten(), reduction="sum") / num_items_in_batch


def replica(module: nn.Module) -> nn.Module:
    copied = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(copied, name, None if parameter is None else parameter * 1)
    copied._buffers = dict(module._buffers)
    copied._modules = {name: child and replica(child) for name, child in module._modules.items()}
    return copied


def t5(**options) -> nn.Module:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double()
    apply_lmoe(model, ["q", "k", "wo"], num_experts=3, rank=2, **options)
    return model
