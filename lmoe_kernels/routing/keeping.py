# SPDX-License-Identifier: Apache-2.0
"""Lets layers keep their router logits for a while, whatever their options say, and computes the shares of the experts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lmoe_kernels.mixture import LayerWithExperts


@contextmanager
def keeping(layers: Mapping[str, LayerWithExperts]) -> Iterator[None]:
    """Let layers keep their router logits within the block. Afterwards those that kept none keep none, and hold none."""
    changed = [
        (layer, adapter)
        for layer in layers.values()
        for adapter, mixture in layer.mixtures().items()
        if not mixture.config.output_router_logits
    ]
    for layer, adapter in changed:
        layer.keep_router_logits(adapter, True)
    try:
        yield
    finally:
        for layer, adapter in changed:
            if adapter in layer.mixtures():  # it may have been deleted
                layer.keep_router_logits(adapter, False)


def shares(logits: Tensor, top_k: int | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The shares of the experts in each token, and which experts each token chose.

    Args:
        logits: (..., E), in fp32 or fp64.
        top_k: how many experts each token keeps; None for all. Then its strongest expert alone counts as chosen.
        bias: (..., E) or None, added to the logits for the choice alone.

    Returns:
        the softmax over the kept experts (..., E), and a tensor (..., E) of ones and zeros.
    """
    if top_k is None:
        best = logits.argmax(dim=-1, keepdim=True)
        return logits.softmax(dim=-1), torch.zeros_like(logits).scatter_(-1, best, 1.0)
    ranked = logits if bias is None else logits + bias
    best = ranked.argsort(dim=-1, descending=True, stable=True)[..., :top_k]  # of equal logits the first, as in the layer
    chosen = torch.zeros_like(logits).scatter_(-1, best, 1.0)
    return logits.masked_fill(chosen == 0, float("-inf")).softmax(dim=-1), chosen
