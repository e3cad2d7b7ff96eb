# SPDX-License-Identifier: Apache-2.0
"""Routers outside the layers: one gate that several layers share, or that reads the running mean of the prefix.

A router belongs to the first layer that uses it, in the order of the model, and is saved with it. Routers of a block or of
the model read the input of the block by a hook, before its layers run. Other routers read the input of their layers.
"""

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_kernels.checks import fail
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.naming import plain_modules, unwrapped
from lmoe_kernels.running_means import Sequences

# Layers of one module that read the same input, by the last segments of their names in the families of transformers.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip


class Router(nn.Module):
    """The gate of several layers, or of one layer that reads the running mean of the prefix.

    Semantics:
        read = running mean of x over the sequence if reads == "prefix" else x
        read = rms_norm(read) unless the router reads the tokens of its own layers
        logits = read @ gate_weight^T + gate_bias, in fp32 (fp64 for fp64), also under autocast

    Args:
        features: H, of what the router reads.
        config: the options of its layers.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        gate_weight: (E, H).
        gate_bias: (E) or None.
        router_logits: (..., E) of the last forward of a router of a block or of the model, or None.
    """

    def __init__(
        self, features: int, config: LayerConfig, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        experts = config.num_experts
        self.shared, self.reads = config.router, config.router_reads
        self.gate_weight = nn.Parameter(torch.empty(experts, features, device=device, dtype=dtype))
        bias = nn.Parameter(torch.zeros(experts, device=device, dtype=dtype)) if config.gate_bias else None
        self.gate_bias: nn.Parameter | None
        self.register_parameter("gate_bias", bias)
        std = features**-0.5 if config.gate_init_std is None and features else config.gate_init_std or 0.0
        nn.init.normal_(self.gate_weight, std=std)
        self.sequences, self.key = Sequences(), ""  # see `connect`
        self.router_logits: Tensor | None = None
        self._read: tuple[Any, int, Tensor, int] | None = None  # an input, its version, its logits, layers that need them

    def connect(self, sequences: Sequences, key: str) -> None:
        """Give the router the sequences of its model, and its key in a cache."""
        self.sequences, self.key = sequences, key

    @property
    def reads_blocks(self) -> bool:
        """Whether the router reads the input of a block, not that of its layers."""
        return self.shared in ("block", "model")

    def features_read(self, x: Tensor) -> Tensor:
        """What the logits are a linear function of: (..., H) in fp32 or fp64.

        Raises:
            ValueError: x has another number of features, or its sequences are not known.
        """
        features = self.gate_weight.shape[1]
        if x.shape[-1] != features:
            fail("Router", "x", f"have {features} features, as many as its layers", tuple(x.shape))
        read = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.reads == "prefix":
            read = self.sequences.running_means(read, self.key)
        return F.rms_norm(read, (features,)) if self.reads_blocks or self.reads == "prefix" else read

    def forward(self, x: Tensor) -> Tensor:
        """The logits (..., E) for an input x (..., H)."""
        with torch.autocast(x.device.type, enabled=False):
            read = self.features_read(x)
            bias = None if self.gate_bias is None else self.gate_bias.to(read)
            return F.linear(read, self.gate_weight.to(read), bias)

    def read_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward of a block: read its input."""
        self.router_logits = self(args[0] if args else kwargs["hidden_states"])

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the logits for an input depend on: the parameters, and what has been read of a block."""
        return self.gate_weight, self.gate_bias, self.router_logits

    def logits_for(self, x: Tensor, layers: int) -> Tensor:
        """The logits (..., E) for the input x (..., I) of one of so many layers.

        Raises:
            ValueError: a router of a block or of the model has not read the input of the block of these tokens.
        """
        if self.reads_blocks:
            return self._of_block(x)
        if layers == 1 or torch.compiler.is_compiling():
            return self(x)
        read, self._read = self._read, None
        if read is not None and read[0]() is x and read[1] == x._version:
            of_x, version, logits, left = read
        else:
            of_x, version, logits, left = weakref.ref(x), x._version, self(x), layers
        if left > 1:  # the other layers of the group call with the same tensor
            self._read = of_x, version, logits, left - 1
        return logits

    def _of_block(self, x: Tensor) -> Tensor:
        logits = self.router_logits
        if logits is None:
            where = "block" if self.shared == "block" else "first block"
            fail("LMoELinear", "router", f"have read the input of its {where} before the layer runs", "none")
        if logits.requires_grad and not torch.is_grad_enabled():  # its recomputation would go through the router twice
            must = "be used with use_reentrant=False where activations are checkpointed"
            fail("LMoELinear", "router", must, "logits with a gradient in a forward without")
        if logits.shape[:-1].numel() != x.shape[:-1].numel():
            got = f"tokens {tuple(logits.shape[:-1])} for an input {tuple(x.shape)}"
            fail("LMoELinear", "router", "have read the tokens that the layer gets", got)
        return logits.view(*x.shape[:-1], logits.shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the logits out of copies, because a tensor with a graph cannot be copied."""
        return {**self.__dict__, "router_logits": None, "_read": None}

    def extra_repr(self) -> str:
        """The sizes and what it reads, for `print(model)`."""
        experts, features = self.gate_weight.shape
        return f"features={features}, num_experts={experts}, shared={self.shared!r}, reads={self.reads!r}"


def scope_of(name: str, config: LayerConfig, modules: Mapping[str, nn.Module]) -> str:
    """A text that is the same for all layers that share a router.

    Raises:
        ValueError: the router is one of blocks, and the layer is in no list of blocks.
    """
    parent, _, own = name.rpartition(".")
    if config.router == "layer":
        return name
    if config.router == "group":
        group = next((group for group in GROUPS if own in group), None)
        return f"{parent}.{'/'.join(group)}" if group and all(f"{parent}.{one}" in modules for one in group) else name
    block = block_of(name, modules)
    if block is None:
        must = f"be in a list of blocks (nn.ModuleList) where router={config.router!r}"
        fail("apply_lmoe", name, must, "a layer outside")
    return block if config.router == "block" else ""


def block_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the outermost element of an nn.ModuleList that a layer is in; None if it is in none."""
    for found in re.finditer(r"\.\d+(?=\.)", name):
        if isinstance(modules.get(name[: found.start()]), nn.ModuleList):
            return name[: found.end()]
    return None


def share_routers(model: nn.Module, layers: Mapping[str, Any], owners: frozenset[str] = frozenset()) -> None:
    """Give the layers of a model whose options ask for it their routers, and let these read the blocks.

    Args:
        model: any model.
        layers: the `LMoELinear` layers of the model by their names in the plain model, those that have routers included.
        owners: the layers that have the routers, where that is known; else each is that of the first layer of its scope.

    Raises:
        ValueError: layers of one scope have other options or other numbers of features, or are in no list of blocks.
    """
    scopes = scopes_of(model, layers)
    if not scopes:
        return
    modules = plain_modules(model)
    hidden = getattr(getattr(unwrapped(model), "config", None), "hidden_size", None)
    sequences = next((layers[n].router.sequences for n in layers if layers[n].router is not None), Sequences())
    made: list[tuple[str, list[str], Router]] = []
    for names in scopes.values():
        owner = next((n for n in names if layers[n].router is not None or n in owners), names[0])
        first, router = layers[owner], layers[owner].router
        if router is None:
            features = hidden if hidden and first.router_scope in ("block", "model") else first.in_features
            weight = first.lora_a
            router = Router(features, first.options(), weight.device, weight.dtype)
        made.append((owner, names, router))
    for owner, names, router in made:
        for name in names:
            layers[name].use_router(router, len(names), owns=name == owner)
    _read_by_hooks(modules, made, sequences)


def scopes_of(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the layers that share a router, by scope, in the model's order.

    Raises:
        ValueError: as `share_routers`.
    """
    modules, scopes = plain_modules(model), dict[str, list[str]]()
    for name, layer in layers.items():
        config = layer.options()
        if not config.own_gate:
            scopes.setdefault(scope_of(name, config, modules), []).append(name)
    for names in scopes.values():
        first = layers[names[0]]
        for name in names[1:]:
            _check_alike(names[0], first, name, layers[name])
    return scopes


def _check_alike(first_name: str, first: Any, name: str, layer: Any) -> None:
    ours, others = layer.options(), first.options()
    for option in ("num_experts", "router", "router_reads", "gate_bias"):
        if getattr(ours, option) != getattr(others, option):
            must = f"have {option}={getattr(others, option)!r} like {first_name!r}, with which it shares a router"
            fail("apply_lmoe", name, must, f"{getattr(ours, option)!r}")
    if ours.router == "group" and layer.in_features != first.in_features:
        must = f"have in_features={first.in_features} like {first_name!r}, with which it shares a router"
        fail("apply_lmoe", name, must, layer.in_features)


def _read_by_hooks(
    modules: Mapping[str, nn.Module], made: list[tuple[str, list[str], Router]], sequences: Sequences
) -> None:
    """Register the hooks that the routers need: before the module that holds the blocks, and before the blocks."""
    disconnect_hooks(sequences)
    entered: set[int] = set()
    for owner, names, router in made:
        router.connect(sequences, owner)
        if router.reads == "prefix":
            for of_layer in dict.fromkeys(block_of(name, modules) for name in names):
                if of_layer is None:
                    continue
                stack = modules[of_layer.rpartition(".")[0].rpartition(".")[0]]
                if id(stack) not in entered:
                    entered.add(id(stack))
                    sequences.handles.append(stack.register_forward_pre_hook(sequences.enter_model, with_kwargs=True))
                    sequences.handles.append(stack.register_forward_hook(sequences.leave_model, always_call=True))
                if id(modules[of_layer]) not in entered:
                    entered.add(id(modules[of_layer]))
                    hook = modules[of_layer].register_forward_pre_hook(sequences.enter_block, with_kwargs=True)
                    sequences.handles.append(hook)
    for owner, _, router in made:
        if router.reads_blocks:
            block = block_of(owner, modules)
            assert block is not None
            sequences.handles.append(modules[block].register_forward_pre_hook(router.read_block, with_kwargs=True))


def disconnect_hooks(sequences: Sequences) -> None:
    """Remove the hooks of the routers of a model."""
    for handle in sequences.handles:
        handle.remove()
    sequences.handles.clear()
