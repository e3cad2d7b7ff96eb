# SPDX-License-Identifier: Apache-2.0
"""A linear layer of vLLM with experts: the base's method computes y, then the experts of the layer are added to it."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers import linear

from lmoe_kernels.checks import fail
from lmoe_kernels.mixture import Choice, of_chosen
from lmoe_kernels.options import Block, places_of
from lmoe_kernels.products import linear_wide
from lmoe_kernels.serving import StackedExperts, explain_stacked
from lmoe_kernels.vllm import layouts
from lmoe_kernels.vllm.layouts import Cut, ShardId

logger = init_logger("vllm.lmoe_kernels")  # vLLM shows what is logged under its own name
_KINDS = (
    linear.QKVParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.ColumnParallelLinear,
    linear.RowParallelLinear,
    linear.ReplicatedLinear,
)
_ROUTERS = ("gate", "router", "shared_expert_gate")
_ABSORBED = ("kv_b_proj",)


class ExpertsParameter(nn.Parameter):
    """A parameter that vLLM's weight stream fills in place, part by part, by a loader that stays.

    vLLM's reload of weights replaces loaders and parameters, and copies a new parameter over the old one as a whole: of a
    stream that holds some of the experts of a layer it would leave the others undefined.
    """

    weight_loader_numel = 0  # how many numbers a reload waits for, and without which it warns

    def __new__(cls, data: Tensor, loader: Callable[..., None]) -> "ExpertsParameter":
        """Make a parameter of this tensor that requires no gradient."""
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, loader: Callable[..., None]) -> None:
        self._loader = loader

    @property
    def weight_loader(self) -> Callable[..., None]:
        """The function (parameter, tensor, shard) that vLLM calls for each tensor of its stream."""
        return self._loader

    @weight_loader.setter
    def weight_loader(self, loader: Callable[..., None]) -> None:
        pass


class LMoEExperts(StackedExperts):
    """The experts of a layer, with what only vLLM's layers need.

    Attributes:
        choice_bias: (sum of E) in fp32, the biases of the choice of experts, or None if no mixture has one.
        router_logits: (kept_tokens, sum of E) in fp32, those of the last step, or None if they are not kept. The address
            never changes, because CUDA graphs hold it.
    """

    choice_bias: Tensor | None
    router_logits: Tensor | None

    def __init__(
        self, blocks: tuple[Block, ...], in_features: int, *, choice_bias: bool, kept_tokens: int, **options: Any
    ) -> None:
        super().__init__(blocks, in_features, **options)
        kept = torch.zeros(kept_tokens, self.gate_weight.shape[0], dtype=torch.float32) if kept_tokens else None
        self.register_buffer("router_logits", kept, persistent=False)
        bias = torch.zeros(self.gate_weight.shape[0], dtype=torch.float32)
        self.choice_bias = nn.Parameter(bias, requires_grad=False) if choice_bias else None


class LMoELinearMethod(linear.LinearMethodBase):
    """The method of a layer that has experts, around the method of the base model.

    The experts are a child module of the layer, `layer.lmoe`, because vLLM reloads weights module by module: it can reload
    the base alone, and `register` excepts modules of the class `LMoEExperts`, which their loaders fill in place.
    """

    def __init__(
        self, base: linear.LinearMethodBase, modules: list[tuple[str | None, ShardId]], prefix: str, config: Any
    ) -> None:
        self.base, self.modules, self.prefix, self.config = base, modules, prefix, config
        self.filled = False
        current = get_current_vllm_config_or_none()
        self.most_tokens = 1 if current is None else current.scheduler_config.max_num_batched_tokens

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the weights of the base, and empty experts."""
        # vLLM chose the loader by the name of this class, not by that of the base's method.
        second = type(self.base).__name__ in linear.WEIGHT_LOADER_V2_SUPPORTED and hasattr(layer, "weight_loader_v2")
        extra_weight_attrs["weight_loader"] = layer.weight_loader_v2 if second else layer.weight_loader
        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype
        self.base.create_weights(layer, *sizes, **extra_weight_attrs)

        self.cut = cut_of(layer, input_size_per_partition, output_partition_sizes, input_size)
        adapters = self.config.adapters
        self.members = layouts.members_of(adapters, self.modules, self.prefix, len(output_partition_sizes))
        blocks = layouts.blocks_of(self.members, self.cut)
        self.places = places_of(blocks)
        configs = [member.layer.config for member in self.members]
        gate_bias, choice_bias = (any(getattr(config, key) for config in configs) for key in ("gate_bias", "choice_bias"))
        kept_tokens = self.most_tokens + layer.tp_size if self.config.keeps_router_logits else 0  # vLLM pads to a multiple
        experts = LMoEExperts(
            blocks, self.cut.rows, dtype=params_dtype, gate_bias=gate_bias, choice_bias=choice_bias, kept_tokens=kept_tokens
        )
        for key, parameter in list(experts.named_parameters()):
            experts.register_parameter(key, ExpertsParameter(parameter.data, self._loader(experts, key)))
        layer.lmoe = experts

    def _loader(self, experts: LMoEExperts, key: str) -> Callable[..., None]:
        def weight_loader(param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
            if self.config.directories:
                must = "be of the adapter of lmoe_adapter (sync_weights replaces one of several)"
                fail(layouts.OP, f"{key} among the weights of a model", must, "several adapters")
            shard = getattr(loaded_weight, "shard_id", None) if loaded_shard_id is None else loaded_shard_id
            for index in layouts.addressed(self.members, key, shard):
                self._fill(experts, index, key, loaded_weight)

        return weight_loader

    def _fill(self, experts: LMoEExperts, index: int, key: str, tensor: Tensor) -> None:
        """Copy this rank's part of a tensor to its place."""
        part = layouts.part_of(self.members[index], key, tensor, self.cut)
        if key == "choice_bias":
            assert experts.choice_bias is not None
            experts.choice_bias.data[self.places[index].experts].copy_(part)
        else:
            experts.fill(index, key, part)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Process the weights of the base; the first time, fill the experts from the directories of the adapters."""
        self.base.process_weights_after_loading(layer)
        if self.filled:  # a reload of the base leaves the experts as they are
            return
        self.config.check_served()
        tensors = self.config.tensors_for(self.prefix)
        for adapter, of_adapter in enumerate(tensors):
            self.fill(layer, adapter, of_adapter)
        self.filled = True
        self._explain(layer.lmoe)

    def fill(self, layer: Any, adapter: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill the experts of one adapter with its tensors, by layer and name."""
        for index, member in enumerate(self.members):
            if member.adapter == adapter:
                for key, tensor in tensors[member.name].items():
                    self._fill(layer.lmoe, index, key, tensor)

    def _explain(self, experts: LMoEExperts) -> None:
        """Log once for each kind of layer which backend computes one token, 64 and as many as a batch may have."""
        if (kind := (experts.layout, experts.in_features)) in self.config.explained:
            return
        self.config.explained.add(kind)
        row = torch.empty(1, experts.in_features, dtype=experts.dtype, device=experts.lora_a.device)
        for tokens in sorted({1, 64, self.most_tokens}):
            logger.info("lmoe: layers like %s: %s", self.prefix, explain_stacked(row.expand(tokens, -1), experts))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y of the base, plus the deltas of the experts."""
        y = self.base.apply(layer, x, bias)
        flat_y, flat_x = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        group = scale = None
        if (tokens := self.config.tokens) is not None:
            count = flat_x.shape[0]
            group, scale = tokens.group[:count], tokens.scale[:count]
        logits = self._gate_logits(layer.lmoe, flat_x)
        layer.lmoe.add_(flat_y, flat_x, gate_logits=logits, token_group=group, token_scale=scale)
        return flat_y.view(y.shape)

    def _gate_logits(self, experts: LMoEExperts, x: Tensor) -> Tensor | None:
        """The router logits where the op cannot compute them (summed over the ranks, or of the chosen experts alone), or
        where they are kept.
        """
        choice_bias, kept = experts.choice_bias, experts.router_logits
        if not self.cut.cuts_inputs and choice_bias is None and kept is None:
            return None
        logits = linear_wide(x, experts.gate_weight)
        if self.cut.cuts_inputs:
            logits = tensor_model_parallel_all_reduce(logits)
        if kept is not None:
            kept[: len(logits)].copy_(logits if experts.gate_bias is None else logits + experts.gate_bias)
        if choice_bias is None:
            return logits
        parts = []
        for member, place in zip(self.members, self.places, strict=True):
            config, of_block = member.layer.config, logits[:, place.experts]
            if config.choice_bias:
                assert config.top_k is not None
                bias = choice_bias[place.experts]
                if experts.gate_bias is not None:
                    bias = bias + experts.gate_bias[place.experts]  # the op adds it to the logits
                of_block = of_chosen(of_block, config.top_k, Choice(bias, None))
            parts.append(of_block)
        return torch.cat(parts, dim=1)


def cut_of(layer: Any, rows: int, columns: list[int], in_features: int) -> Cut:
    """What this rank holds of a layer, as vLLM cuts its weight."""
    if isinstance(layer, linear.RowParallelLinear):
        return layouts.row_cut(in_features, rows, layer.tp_rank, columns)
    if isinstance(layer, linear.ReplicatedLinear):
        return layouts.column_cut(in_features, columns, columns, [0] * len(columns))
    whole, ranks = [size * layer.tp_size for size in columns], [layer.tp_rank] * len(columns)
    if isinstance(layer, linear.QKVParallelLinear):
        keys = layer.total_num_kv_heads
        whole = [layer.total_num_heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
        ranks[1:] = [layer.tp_rank // layer.num_kv_head_replicas] * 2
    return layouts.column_cut(in_features, whole, columns, ranks)


def why_not_served(layer: nn.Module, prefix: str) -> str | None:
    """The reason why experts of a layer would not act, or would be cut in another way than the weight."""
    last = prefix.rpartition(".")[2]
    if last in _ROUTERS:
        return f"the router {prefix!r} of the model's own experts"
    if last in _ABSORBED:
        return f"{prefix!r}, whose weight vLLM's attention reads without a call of the layer"
    kind = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
    if kind is None:
        return f"a {type(layer).__name__}"
    for name in ("forward", "weight_loader", "weight_loader_v2"):
        if getattr(type(layer), name, None) is not getattr(kind, name, None):
            return f"a {type(layer).__name__}, which has a {name} of its own"
    return None
