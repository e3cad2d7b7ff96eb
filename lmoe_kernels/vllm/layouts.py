# SPDX-License-Identifier: Apache-2.0
"""What vLLM's layers hold of an adapter: the modules of a fused layer, a rank's part of each tensor. Needs no vLLM.

vLLM computes several modules of a model in one fused layer (q, k and v). Its tensor-parallel ranks hold parts of a layer:

    column parallel (qkv, gate_up)   x whole     A, gate whole    B cut along O, like the weight
    row parallel (o, down)           x cut       A, gate cut      B whole    the ranks sum their router logits

After the gates every step is linear in what a rank holds, so the sum of the ranks' outputs, which vLLM computes for the
frozen layer anyway, includes the experts.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmoe_kernels.checks import check_bool, fail
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.options import Block
from lmoe_kernels.reader import SavedLayers, check_tensor, saved_layers
from lmoe_kernels.router_scopes import GROUPS
from lmoe_kernels.vllm.adapters import directories_of

OP = "lmoe"  # the name in errors: that of the quantization method
ONE_ADAPTER, SEVERAL = "lmoe_adapter", "lmoe_adapters"  # the entries of --hf-overrides
ROUTER_LOGITS = "lmoe_router_logits"  # another entry: whether the layers keep their router logits
ONE = "default"  # the name of the one adapter
KEYS = ("lora_a", "lora_b", "gate_weight", "gate_bias", "choice_bias")
_ROUTER = "router."
ShardId = str | int | None  # vLLM's name of a module within a fused layer; None for a layer that is one module


class ServedLayer(NamedTuple):
    """One module of an adapter, without its tensors."""

    config: LayerConfig
    in_features: int
    out_features: int
    gate: str  # the name of the layer that the gate is saved with: another one if the layers of a group share it

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of the layer, with the gate, also if it is shared."""
        return self.config._replace(router="layer").shapes(self.in_features, self.out_features)


class ServedAdapter(NamedTuple):
    """An adapter that vLLM serves, without its tensors: each worker process reads these itself."""

    name: str
    directory: str
    digest: str
    layers: dict[str, ServedLayer]  # by their names in the plain model


class Output(NamedTuple):
    """The columns of one module in a layer, and those of them that this rank holds."""

    whole: int
    start: int
    size: int


class Cut(NamedTuple):
    """What a rank holds of a layer."""

    in_features: int  # of the whole layer
    inputs: slice  # those of the rank
    outputs: tuple[Output, ...]  # of the modules of a fused layer, one after the other

    @property
    def rows(self) -> int:
        """The number of features of x on the rank."""
        return self.inputs.stop - self.inputs.start

    @property
    def cuts_inputs(self) -> bool:
        """Whether the ranks hold different features of x, so that their router logits must be summed."""
        return self.rows < self.in_features


def column_cut(in_features: int, whole: Sequence[int], sizes: Sequence[int], ranks: Sequence[int]) -> Cut:
    """The cut of a layer whose outputs are divided. Each output has its own rank: with more ranks than heads of keys and
    values, several ranks hold the same head.

    Args:
        in_features: I.
        whole: the columns of each output.
        sizes: how many of them a rank holds.
        ranks: which of the parts this rank holds.
    """
    outputs = tuple(Output(n, rank * size, size) for n, size, rank in zip(whole, sizes, ranks, strict=True))
    return Cut(in_features, slice(0, in_features), outputs)


def row_cut(in_features: int, rows: int, rank: int, outputs: Sequence[int]) -> Cut:
    """The cut of a layer whose inputs are divided into parts of this many rows."""
    start = rank * rows if rows < in_features else 0
    return Cut(in_features, slice(start, start + rows), tuple(Output(size, 0, size) for size in outputs))


class Member(NamedTuple):
    """One mixture of a layer: one adapter's experts of one module."""

    adapter: int  # its index
    name: str  # of the module in the plain model
    shard: ShardId
    outputs: slice  # its elements of `Cut.outputs`
    layer: ServedLayer


def entries_of(hf_config: Any) -> list[str]:
    """The entries of --hf-overrides that name adapters."""
    return [entry for entry in (ONE_ADAPTER, SEVERAL) if getattr(hf_config, entry, None) is not None]


def adapter_directories(hf_config: Any) -> dict[str, str]:
    """The directories of the adapters that --hf-overrides names, by the names of the adapters."""
    entries = entries_of(hf_config)
    if len(entries) == 2:
        fail(OP, "--hf-overrides", f"name {ONE_ADAPTER} or {SEVERAL}", "both")
    if SEVERAL in entries:
        return directories_of(getattr(hf_config, SEVERAL))
    directory = getattr(hf_config, ONE_ADAPTER, None)
    if not isinstance(directory, str | os.PathLike) or not str(directory):
        fail(OP, "--hf-overrides", f'name the directory of the adapter: {{"{ONE_ADAPTER}": "DIR"}}', repr(directory))
    if not Path(directory).is_dir():
        fail(OP, f"{ONE_ADAPTER} of --hf-overrides", "be a directory that save_lmoe wrote", f"{str(directory)!r}")
    return {ONE: str(directory)}


def keeps_router_logits(hf_config: Any) -> bool:
    """Whether --hf-overrides say that the layers keep the router logits of each step."""
    keeps = getattr(hf_config, ROUTER_LOGITS, False)
    check_bool(OP, f"{ROUTER_LOGITS} of --hf-overrides", keeps)
    return keeps


def served_adapter(name: str, directory: str) -> ServedAdapter:
    """Read what an adapter contains, and refuse what vLLM cannot serve.

    Raises:
        ValueError: the directory does not hold what `save_lmoe` wrote, or something that vLLM cannot serve.
    """
    saved = saved_layers(OP, directory)
    if saved.modules_to_save:
        got = f"{next(iter(saved.modules_to_save))!r} in {directory} (save it with the base model)"
        fail(OP, "an adapter", "contain no other trained modules (modules_to_save)", got)
    for layer, (config, _) in saved.layers.items():
        if config.router in ("block", "model") or config.router_reads != "token":
            got = f"router={config.router!r}, router_reads={config.router_reads!r}"
            fail(OP, f"layer {layer!r}", "have a router that reads the layer's own tokens (router='layer' or 'group')", got)
    gates, tensors = _gates_of(saved), tensors_to_serve(saved)
    layers = {layer: ServedLayer(found.config, *found.features, gates[layer]) for layer, found in saved.layers.items()}
    for layer, served in layers.items():
        for key, shape in served.shapes.items():
            check_tensor(OP, key, tensors[layer], shape)
    return ServedAdapter(name, directory, saved.digest, layers)


def tensors_to_serve(saved: SavedLayers) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by the names `KEYS`. Layers that share a router each have its gate."""
    result: dict[str, dict[str, Tensor]] = {}
    for name, gate in _gates_of(saved).items():
        of_router = {key.removeprefix(_ROUTER): tensor for key, tensor in saved.layers[gate].tensors.items()}
        own = {key: tensor for key, tensor in saved.layers[name].tensors.items() if key in KEYS}
        result[name] = {key: of_router[key] for key in KEYS if key in of_router and key.startswith("gate_")} | own
    return result


def _gates_of(saved: SavedLayers) -> dict[str, str]:
    """The layer that each layer's gate is saved with. The first layer of a group has it, and comes first in the file."""
    gates: dict[str, str] = {}
    latest: dict[str, str] = {}
    for name, (config, tensors) in saved.layers.items():
        if config.own_gate:
            gates[name] = name
            continue
        parent, _, own = name.rpartition(".")
        group = f"{parent}.{next((names for names in GROUPS if own in names), own)}"
        if f"{_ROUTER}gate_weight" in tensors:
            latest[group] = name
        if group not in latest:
            fail(OP, f"layer {name!r}", "have a gate, or share that of a layer before it", "none")
        gates[name] = latest[group]
    return gates


def modules_of(prefix: str, packed: Mapping[str, Sequence[str]], is_qkv: bool) -> list[tuple[str, ShardId]]:
    """The names of the modules that a layer computes, with vLLM's names for them within the layer.

    Args:
        prefix: the name of the layer in vLLM's model.
        packed: the last segments of the names of fused layers, and those of their modules, of vLLM's model.
        is_qkv: whether vLLM names the modules "q", "k" and "v" instead of numbering them.
    """
    parent, dot, last = prefix.rpartition(".")
    parts = list(packed.get(last, [last]))
    if parts == [last]:
        return [(prefix, None)]
    shards: Iterable[ShardId] = "qkv" if is_qkv and len(parts) == 3 else range(len(parts))
    return [(f"{parent}{dot}{part}", shard) for part, shard in zip(parts, shards, strict=True)]


def members_of(
    adapters: Sequence[ServedAdapter], modules: Sequence[tuple[str | None, ShardId]], prefix: str, outputs: int
) -> list[Member]:
    """The mixtures of a layer: adapter by adapter, module by module.

    Args:
        adapters: all adapters that are served.
        modules: the names in the plain model of the layer's modules (None for one that no adapter names), and vLLM's.
        prefix: the name of the layer in vLLM's model.
        outputs: into how many modules the layer's columns are divided.
    """
    members: list[Member] = []
    for index, adapter in enumerate(adapters):
        names = [name for name, _ in modules]
        for i, (name, shard) in enumerate(modules):
            if name is None or name not in adapter.layers:
                continue
            if len(modules) not in (1, outputs):
                fail(OP, f"layer {prefix!r}", "have as many outputs as modules", f"{outputs} for {len(modules)} modules")
            layer = adapter.layers[name]
            if layer.gate not in names:
                must = f"be in one layer of vLLM with {layer.gate!r}, with which it shares a router"
                fail(OP, f"layer {name!r}", must, f"it in {prefix!r}")
            columns = slice(0, outputs) if len(modules) == 1 else slice(i, i + 1)
            members.append(Member(index, name, shard, columns, layer))
    return members


def blocks_of(members: Sequence[Member], cut: Cut) -> tuple[Block, ...]:
    """The mixtures of a layer as the blocks of `StackedExperts`, with this rank's columns.

    Raises:
        ValueError: the features of a layer are not those of the adapter, which belongs to another model.
    """
    blocks: list[Block] = []
    for member in members:
        outputs, config = cut.outputs[member.outputs], member.layer.config
        features, expected = (cut.in_features, sum(output.whole for output in outputs)), member.layer[1:3]
        if features != expected:
            must = f"have {expected[0]} features in and {expected[1]} out, as the base model of its adapter"
            fail(OP, f"layer {member.name!r}", must, f"{features[0]} and {features[1]}")
        assert config.alpha is not None
        blocks.append(
            Block(
                config.num_experts,
                config.rank,
                sum(output.size for output in outputs),
                column=sum(output.size for output in cut.outputs[: member.outputs.start]),
                shared_a=config.shared_a,
                scaling=config.alpha / config.rank,
                mixing=config.mixing,
                top_k=config.top_k,
                renormalize=config.renormalize,
                group=member.adapter,
            )
        )
    return tuple(blocks)


def part_of(member: Member, key: str, tensor: Tensor, cut: Cut) -> Tensor:
    """The part of a tensor that this rank holds.

    Raises:
        ValueError: the tensor does not have the shape that it has in the adapter.
    """
    check_tensor(OP, f"{member.name}.{key}", {f"{member.name}.{key}": tensor}, member.layer.shapes[key])
    if key in ("lora_a", "gate_weight"):
        return tensor[..., cut.inputs]
    if key != "lora_b":
        return tensor
    parts, column = [], 0
    for output in cut.outputs[member.outputs]:
        parts.append(tensor[..., column + output.start : column + output.start + output.size])
        column += output.whole
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def addressed(members: Sequence[Member], key: str, shard: ShardId) -> list[int]:
    """The indices of the mixtures that a tensor of vLLM's weight stream is for: several if they share its gate."""
    named = [member for member in members if member.shard == shard]
    if not named:
        of = ", ".join(repr(member.name) for member in members)
        fail(OP, f"{key} of the module {shard!r}", f"belong to one of {of}", "no experts there")
    gates = {(member.adapter, member.name) for member in named}
    if not key.startswith("gate_"):
        return [i for i, member in enumerate(members) if member.shard == shard]
    return [i for i, member in enumerate(members) if (member.adapter, member.layer.gate) in gates]


def stream_pattern(adapters: Iterable[ServedAdapter]) -> re.Pattern[str]:
    r"""A pattern for the tensors of experts among a model's weights, by their names in training.

    Replacing the match by "\1.lmoe.\2" gives the name in vLLM's model. The pattern does not match a replaced name, because
    vLLM maps the names of nested modules more than once.
    """
    last = {name.rpartition(".")[2] for adapter in adapters for name in adapter.layers}
    return re.compile(rf"(?<![^.])({'|'.join(sorted(map(re.escape, last)))})(?:\.router)?\.({'|'.join(KEYS)})$")


def unserved(adapters: Iterable[ServedAdapter], served: Iterable[str], blocks: range | None) -> str | None:
    """The first name of an adapter that no layer of vLLM's model has. `blocks` are those of this pipeline rank."""
    known = set(served)
    for adapter in adapters:
        for name in adapter.layers:
            number = re.search(r"\.(\d+)\.", name)
            elsewhere = blocks is not None and number is not None and int(number[1]) not in blocks
            if name not in known and not elsewhere:
                return name
    return None


def layers_with_experts(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The layers of vLLM's model that have experts, and their methods, each an `LMoELinearMethod`."""
    for layer in model.modules():
        if isinstance(getattr(layer, "lmoe", None), nn.Module):
            yield layer, layer.quant_method
