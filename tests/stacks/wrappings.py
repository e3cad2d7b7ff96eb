"""The wrappers that real trainings put around a model."""

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lmoe_kernels import LMoELinear
from lmoe_kernels.naming import unwrapped
from tests.stacks.flow import Stack

CPU = torch.device("cpu")


def compiled_blocks(model: nn.Module) -> nn.Module:
    """torch.compile a block at a time; aot_eager traces and partitions like the default backend, but generates no code."""
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="aot_eager")
    return model


def checkpointed_blocks(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def transformers_checkpointing(model: nn.Module, use_reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # the reentrant kind trains nothing if no input of a block requires a gradient
    return model


def fsdp1(model: nn.Module, **options) -> nn.Module:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=CPU, use_orig_params=True, **options)


def fsdp1_by_layer(model: nn.Module, use_orig_params: bool) -> nn.Module:
    """A unit's parameters are all trained or all frozen, and of one dtype: L-MoE layers, their frozen layers, the head."""
    parts = {id(part) for m in model.modules() if isinstance(m, LMoELinear) for part in (m, m.frozen_layer)}
    policy = CustomPolicy(lambda module: id(module) in parts or module is model.lm_head)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=CPU, use_orig_params=use_orig_params)


def fsdp2(model: nn.Module, blocks: bool = True, **options) -> nn.Module:
    for block in unwrapped(model).model.layers if blocks else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp2_over_all(model: nn.Module) -> nn.Module:
    """Checkpointed, compiled, sharded blocks, as in large trainings."""
    return fsdp2(compiled_blocks(checkpointed_blocks(model)))


def accelerated(model: nn.Module) -> nn.Module:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True).prepare(model)


BF16 = torch.bfloat16
ONE_PROCESS = {
    "plain": Stack(lambda model: model),
    "compiled blocks": Stack(compiled_blocks),
    "apply_activation_checkpointing": Stack(checkpointed_blocks),
    "gradient_checkpointing_enable": Stack(partial(transformers_checkpointing, use_reentrant=False)),
    "gradient_checkpointing_enable, reentrant": Stack(partial(transformers_checkpointing, use_reentrant=True)),
}
STACKS = {
    "DDP": Stack(nn.parallel.DistributedDataParallel),
    "DDP, bf16 base": Stack(nn.parallel.DistributedDataParallel, base=BF16),
    "FSDP1": Stack(fsdp1),
    "FSDP1 whole": Stack(lambda model: FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)),
    "FSDP1, flat parameters": Stack(partial(fsdp1_by_layer, use_orig_params=False), apart=True),
    "FSDP1, bf16 base": Stack(partial(fsdp1_by_layer, use_orig_params=True), base=BF16, apart=True),
    "FSDP1, mixed precision": Stack(
        partial(fsdp1, mixed_precision=MixedPrecision(param_dtype=BF16)), base=torch.float32, computed=BF16
    ),
    "FSDP2": Stack(fsdp2),
    "FSDP2 whole": Stack(partial(fsdp2, blocks=False)),
    "FSDP2, bf16 base": Stack(fsdp2, base=BF16),
    "FSDP2, mixed precision": Stack(
        partial(fsdp2, mp_policy=MixedPrecisionPolicy(param_dtype=BF16)), base=torch.float32, computed=BF16
    ),
    "FSDP2 over compiled, checkpointed blocks": Stack(fsdp2_over_all),
    "Accelerate": Stack(accelerated),
}
