# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model share a router, found by their names, and which layers cannot have one."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lmoe_kernels.checks import fail
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.linears import features_of
from lmoe_kernels.naming import plain_modules, unwrapped

# Layers of one module that read the same input, by the last segments of their names in the families of transformers.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
# Cross-attention is part of the decoder, but computes its keys and values from the encoder's tokens.
CROSS_ATTENTION = re.compile(r"cross|encoder_att|enc_?dec", re.IGNORECASE)
_KEYS_OR_VALUES = re.compile(r"(k|v|kv|key|value)(_proj|_lin)?|w[kv]")


class Scope(NamedTuple):
    """The layers that share a router. The first one has it."""

    layers: list[str]  # their names in the plain model, in the model's order
    config: LayerConfig  # of the first layer
    features: int  # H, of what the router reads
    block: str | None  # the name of the block that the first layer is in


def scopes_of(op: str, model: nn.Module, layers: Mapping[str, tuple[LayerConfig, int]]) -> list[Scope]:
    """The layers that share routers, in the model's order. Layers with a gate of their own are in none.

    Args:
        op: the public function, for errors.
        model: any model, in which the layers may still be plain.
        layers: the options and the in_features of all layers with experts by their names in the plain model, in any order.

    Raises:
        ValueError: layers of one router have other options, experts or numbers of features, or a layer does not get all
            tokens that its router reads.
    """
    routed = {name: layer for name, layer in layers.items() if not layer[0].own_gate}
    if not routed:
        return []
    modules = plain_modules(model)
    by_key: dict[str, list[str]] = {}
    for name in (name for name in modules if name in routed):
        by_key.setdefault(_key(op, model, name, routed[name][0], modules), []).append(name)
    hidden = getattr(getattr(unwrapped(model), "config", None), "hidden_size", None)
    scopes: list[Scope] = []
    for names in by_key.values():
        config, features = routed[names[0]]
        for name in names[1:]:
            _check_alike(op, names[0], routed[names[0]], name, routed[name])
        block = block_of(names[0], modules)
        if config.router in ("block", "model"):
            assert block is not None
            features = _features_of_block(modules, block, hidden)
        scopes.append(Scope(names, config, features, block))
    return scopes


def block_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the outermost element of an nn.ModuleList that a layer is in; None if it is in none."""
    for found in re.finditer(r"\.\d+(?=\.)", name):
        if isinstance(modules.get(name[: found.start()]), nn.ModuleList):
            return name[: found.end()]
    return None


def stack_of(block: str) -> str:
    """The name of the module that holds the list of a block."""
    return block.rpartition(".")[0].rpartition(".")[0]


def reads_encoder(name: str) -> bool:
    """Whether a layer's name is that of keys or values of cross-attention, which are computed from the encoder's tokens."""
    parts = name.split(".")
    return any(map(CROSS_ATTENTION.search, parts)) and _KEYS_OR_VALUES.fullmatch(parts[-1]) is not None


def _key(op: str, model: nn.Module, name: str, config: LayerConfig, modules: Mapping[str, nn.Module]) -> str:
    """A text that is the same for all layers that share a router."""
    block = block_of(name, modules)
    of_blocks = config.router in ("block", "model")
    if of_blocks or config.router_reads == "prefix":
        where = f"where router={config.router!r}, router_reads={config.router_reads!r}"
        if block is None and (of_blocks or hasattr(unwrapped(model), "config")):
            fail(op, name, f"be in a list of blocks (nn.ModuleList) {where}", "a layer outside")
        if reads_encoder(name):
            fail(op, name, f"read the tokens of its block {where}", "keys or values of cross-attention")
        if "experts" in name.split("."):
            fail(op, name, f"get all tokens of its block {where}", "an expert of the model, which gets some of them")
    if config.router == "layer":
        return name
    if config.router == "group":
        return _group(name, modules)
    assert block is not None
    return block if config.router == "block" else stack_of(block)


def _group(name: str, modules: Mapping[str, nn.Module]) -> str:
    """A text that is the same for all layers of a group. Of cross-attention only keys and values are one."""
    own = name.rpartition(".")[2]
    parent = name.removesuffix(own)
    group = next((group for group in GROUPS if own in group), ())
    if reads_encoder(name):
        group = group[1:]
    elif any(reads_encoder(parent + other) for other in group):
        return name
    return f"{parent}{'/'.join(group)}" if group and all(parent + other in modules for other in group) else name


def _features_of_block(modules: Mapping[str, nn.Module], block: str, hidden: int | None) -> int:
    """The features of the input of a block: those of the model, or else of the first linear layer of the block."""
    found = [features_of(module) for name, module in modules.items() if name.startswith(f"{block}.")]
    sizes = [size[0] for size in found if size is not None]
    return hidden if hidden in sizes else sizes[0]


def _check_alike(
    op: str, first_name: str, first: tuple[LayerConfig, int], name: str, layer: tuple[LayerConfig, int]
) -> None:
    (ours, in_features), (others, of_first) = layer, first
    pairs = {
        option: (getattr(ours, option), getattr(others, option))
        for option in ("num_experts", "router", "router_reads", "gate_bias")
    }
    pairs["expert_names"] = (ours.names(), others.names())
    if ours.router == "group":
        pairs["in_features"] = (in_features, of_first)
    for option, (got, expected) in pairs.items():
        if got != expected:
            must = f"have {option}={expected!r} like {first_name!r}, with which it shares a router"
            fail(op, name, must, repr(got))
