# SPDX-License-Identifier: Apache-2.0
"""Finds the layers of a model that can be computed as stacks, and makes groups of them."""

from torch import nn

from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.router_scopes import CROSS_ATTENTION, GROUPS
from lmoe_kernels.stack_group import StackGroup
from lmoe_kernels.targets import lmoe_layers


def stack_layers(model: nn.Module) -> None:
    """Make a group of the L-MoE layers of each module that read the same input by their names, see `StackGroup`.

    Results do not change, but for rounding. A module of cross-attention gets no group.
    """
    by_parent: dict[str, dict[str, LMoELinear]] = {}
    for name, layer in lmoe_layers(model).items():
        parent, _, own = name.rpartition(".")
        by_parent.setdefault(parent, {})[own] = layer
    for parent, children in by_parent.items():
        if CROSS_ATTENTION.search(".".join(parent.split(".")[-2:])):  # its q reads another tensor than its k and v
            continue
        for group in GROUPS:
            members = [children[own] for own in group if own in children]
            if len(members) > 1:
                stack = StackGroup(len(members))
                for position, layer in enumerate(members):
                    layer.join(stack, position)
