# SPDX-License-Identifier: Apache-2.0
"""Routers outside the layers: one gate that several layers share, or that reads the running mean of the prefix.

A router belongs to the first layer that uses it, in the order of the model, and is saved with it. Routers of a block or of
the model read the input of the block by a hook, before its layers run. Other routers read the input of their layers.
"""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lmoe_kernels.checks import fail
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.naming import plain_modules
from lmoe_kernels.router_scopes import Scope, block_of, scopes_of, stack_of
from lmoe_kernels.running_means import Sequences


class _Read(NamedTuple):
    """The logits of a router for one input of the layers that share it."""

    x: weakref.ref[Tensor]
    of_x: tuple[object, ...]  # what else they depend on, see `_circumstances`
    logits: Tensor
    left: int  # how many more layers need them


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
        router_logits: (..., E) of a router of a block or of the model, while its layers run; else None.
        disabled: whether it skips reading blocks, because its layers are disabled, see `disable_lmoe`.
    """

    def __init__(
        self, features: int, config: LayerConfig, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        experts = self.num_experts = config.num_experts
        self.shared, self.reads = config.router, config.router_reads
        self.features, self.disabled = features, False
        self.gate_weight = nn.Parameter(torch.empty(experts, features, device=device, dtype=dtype))
        bias = nn.Parameter(torch.zeros(experts, device=device, dtype=dtype)) if config.gate_bias else None
        self.gate_bias: nn.Parameter | None
        self.register_parameter("gate_bias", bias)
        std = features**-0.5 if config.gate_init_std is None and features else config.gate_init_std or 0.0
        nn.init.normal_(self.gate_weight, std=std)
        self.sequences, self.key = Sequences(), ""  # see `connect`
        self.router_logits: Tensor | None = None
        self._read: _Read | None = None

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
        if x.shape[-1] != self.features:
            of = "the input of its block" if self.reads_blocks else "its layers"
            fail("Router", "x", f"have {self.features} features, as many as {of}", tuple(x.shape))
        read = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.reads == "prefix":
            read = self.sequences.running_means(read, self.key)
        return F.rms_norm(read, (self.features,)) if self.reads_blocks or self.reads == "prefix" else read

    def forward(self, x: Tensor) -> Tensor:
        """The logits (..., E) for an input x (..., H)."""
        with torch.autocast(x.device.type, enabled=False):
            read = self.features_read(x)
            bias = None if self.gate_bias is None else self.gate_bias.to(read)
            return F.linear(read, self.gate_weight.to(read), bias)

    def read_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward of a block: read its input."""
        self.router_logits = None if self.disabled else self(input_of_block(args, kwargs))

    def leave_block(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A hook after the forward of the block: no later call of a layer may use these logits."""
        self.router_logits = None

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
        if layers == 1 or torch.compiler.is_compiling() or (x.is_inference() and self.reads == "token"):
            return self(x)  # tensors of inference mode have no version; a mean must not add its tokens to a cache twice
        read, self._read = self._read, None
        if read is None or read.x() is not x or read.of_x != self._circumstances(x):
            read = _Read(weakref.ref(x), self._circumstances(x), self(x), layers)
        if read.left > 1:
            self._read = read._replace(left=read.left - 1)
        return read.logits

    def _circumstances(self, x: Tensor) -> tuple[object, ...]:
        """What may change between the calls of two layers with the same tensor x, for example in a later forward."""
        tensors = (self.gate_weight, self.gate_bias)
        version = None if x.is_inference() else x._version
        return torch.is_grad_enabled(), version, *((id(t), t._version) for t in tensors if t is not None)

    def _of_block(self, x: Tensor) -> Tensor:
        logits = self.router_logits
        where = "block" if self.shared == "block" else "first block"
        if logits is None:
            got = "none (activation checkpointing needs use_reentrant=False)" if torch.is_grad_enabled() else "none"
            fail("LMoELinear", "router", f"have read the input of its {where} before the layer runs", got)
        if logits.requires_grad and not torch.is_grad_enabled():  # its recomputation would go through the router twice
            must = "be used with use_reentrant=False where activations are checkpointed"
            fail("LMoELinear", "router", must, "logits with a gradient in a forward without")
        if logits.shape[:-1].numel() != x.shape[:-1].numel():
            got = f"tokens {tuple(logits.shape[:-1])} for an input {tuple(x.shape)}"
            fail("LMoELinear", "router", "have read the tokens that the layer gets", got)
        if torch.is_grad_enabled() and self.gate_weight.requires_grad and not logits.requires_grad:
            got = "logits without gradients (activation checkpointing needs use_reentrant=False)"
            fail("LMoELinear", "router", f"have read the input of its {where} with gradients", got)
        return logits.to(x.device).view(*x.shape[:-1], logits.shape[-1])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, by name."""
        shapes: dict[str, tuple[int, ...]] = {"gate_weight": (self.num_experts, self.features)}
        return shapes if self.gate_bias is None else {**shapes, "gate_bias": (self.num_experts,)}

    def gate(self) -> dict[str, nn.Parameter]:
        """The parameters, by name."""
        return {key: parameter for key, parameter in self._parameters.items() if parameter is not None}

    def set_gate(self, gate_weight: nn.Parameter, gate_bias: nn.Parameter | None) -> None:
        """Replace the parameters, whose number of experts may change."""
        self.num_experts = gate_weight.shape[0]
        self.gate_weight = gate_weight
        self.register_parameter("gate_bias", gate_bias)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the logits out of copies, because a tensor with a graph cannot be copied."""
        return {**self.__dict__, "router_logits": None, "_read": None}

    def extra_repr(self) -> str:
        """The sizes and what it reads, for `print(model)`."""
        return f"features={self.features}, num_experts={self.num_experts}, shared={self.shared!r}, reads={self.reads!r}"


def share_routers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give the layers of a model whose options ask for it their routers, and let these read the blocks.

    The first layer of those that share a router has it. A router that they have already stays, and moves to the first one.

    Args:
        model: any model.
        layers: the `LMoELinear` layers of the model by their names in the plain model, those that have routers included.

    Raises:
        ValueError: as `scopes_of`.
    """
    scopes = scopes_of("apply_lmoe", model, {n: (layer.options(), layer.in_features) for n, layer in layers.items()})
    if not scopes:
        return
    known = [layer.router for layer in layers.values() if layer.router is not None]
    sequences = known[0].sequences if known else Sequences()
    routers: list[Router] = []
    for scope in scopes:
        router: Router | None = next((layers[n].router for n in scope.layers if layers[n].router is not None), None)
        if router is None:
            weight = layers[scope.layers[0]].lora_a
            router = Router(scope.features, scope.config, weight.device, weight.dtype)
        for name in scope.layers:
            layers[name].use_router(router, len(scope.layers), owns=name == scope.layers[0])
        router.connect(sequences, scope.layers[0])
        routers.append(router)
    disconnect_hooks(sequences)
    _register_hooks(plain_modules(model), list(zip(scopes, routers, strict=True)), sequences)


def _register_hooks(modules: Mapping[str, nn.Module], pairs: list[tuple[Scope, Router]], sequences: Sequences) -> None:
    """Register the hooks that the routers need: around the modules that hold the blocks, and around the blocks."""
    handles = sequences.handles
    repetitions = Repetitions(sequences, [router for _, router in pairs if router.reads_blocks])
    of_forward = [scope for scope, router in pairs if router.reads == "prefix" or router.reads_blocks]
    names = [block for scope in of_forward for name in scope.layers if (block := block_of(name, modules)) is not None]
    blocks = {id(modules[name]): modules[name] for name in names}  # a block may have several names
    stacks = {id(stack): stack for name in names for stack in (modules[stack_of(name)],)}
    for stack in stacks.values():
        handles.append(stack.register_forward_pre_hook(sequences.enter_model, with_kwargs=True))
        handles.append(stack.register_forward_pre_hook(repetitions.enter_model))
        handles.append(stack.register_forward_hook(sequences.leave_model, always_call=True))
        handles.append(stack.register_forward_hook(repetitions.leave_model, always_call=True))
    for block in blocks.values():
        handles.append(block.register_forward_pre_hook(sequences.enter_block, with_kwargs=True))
        for part in (block, *_called_in(block)):
            handles.append(part.register_forward_pre_hook(repetitions.recall, with_kwargs=True))
    for scope, router in pairs:
        if router.reads_blocks:
            assert scope.block is not None
            handles.append(modules[scope.block].register_forward_pre_hook(router.read_block, with_kwargs=True))
            if router.shared == "block":
                handles.append(modules[scope.block].register_forward_hook(router.leave_block, always_call=True))
    for block in blocks.values():
        handles.append(block.register_forward_pre_hook(repetitions.keep, with_kwargs=True))
        handles.append(block.register_forward_hook(repetitions.leave_block, always_call=True))


def _called_in(block: nn.Module) -> list[nn.Module]:
    """The modules that the forward of a block calls itself."""
    parts: list[nn.Module] = []
    for child in block.children():
        parts += _called_in(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
    return parts


def disconnect_hooks(sequences: Sequences) -> None:
    """Remove the hooks of the routers of a model."""
    for handle in sequences.handles:
        handle.remove()
    sequences.handles.clear()


class _Given(NamedTuple):
    """What the routers of a block depended on in a forward."""

    mask: Tensor | None
    positions: Tensor | None
    logits: list[Tensor | None]  # of the routers that read blocks, without their graph


class Repetitions:
    """What the hooks of a forward gave to a block, for activation checkpointing, which runs the block again in the backward.

    By then another forward may have begun, with other padding and other logits. And transformers repeats the forward of a
    block without its hooks. So the first module in the block that is called with the input of the block restores it: in a
    repetition this input is the same tensor. Its graph is that of the first time, so the values of the logits are enough.
    """

    def __init__(self, sequences: Sequences, routers: list[Router]) -> None:
        self.sequences, self.routers = sequences, routers  # those that read blocks
        self.in_model = self.in_block = False  # whether they are in a forward with hooks
        self.given: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # `_Given` by the input of a block

    def enter_model(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook before the forward of the module that holds the blocks."""
        self.in_model = True

    def leave_model(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A hook after the forward of that module: no later call of a layer may use these logits."""
        self.in_model = False
        for router in self.routers:
            router.router_logits = None

    def recall(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward of a block and of the modules that it calls: restore what was given to its input."""
        if self.in_model or self.in_block or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        x = args[0] if args else kwargs.get("hidden_states")
        given: _Given | None = self.given.get(x) if isinstance(x, Tensor) else None
        if given is not None:
            self.sequences.mask, self.sequences.positions = given.mask, given.positions
            for router, logits in zip(self.routers, given.logits, strict=True):
                router.router_logits = logits

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward of a block, after those that the routers depend on."""
        self.in_block = True
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        x = input_of_block(args, kwargs)
        if self.in_model or x not in self.given:
            logits = [router.router_logits for router in self.routers]
            values = [None if z is None else z.detach().requires_grad_(z.requires_grad) for z in logits]
            self.given[x] = _Given(self.sequences.mask, self.sequences.positions, values)

    def leave_block(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A hook after the forward of a block."""
        self.in_block = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors of earlier forwards out of copies."""
        return {"sequences": self.sequences, "routers": self.routers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without forwards."""
        self.__init__(state["sequences"], state["routers"])


def input_of_block(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a block among the arguments of its forward.

    Raises:
        ValueError: it is neither the first argument nor named hidden_states.
    """
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor):
        got = type(args[0]).__name__ if args else f"the keywords {sorted(kwargs)}"
        fail("Router", "block", "get its input as the first argument or as hidden_states", got)
    return x
