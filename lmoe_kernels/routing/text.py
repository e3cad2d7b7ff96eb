# SPDX-License-Identifier: Apache-2.0
"""The strongest expert of each token of a text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmoe_kernels.checks import fail
from lmoe_kernels.routing.keeping import keeping, shares
from lmoe_kernels.targets import layers_with_experts, nearest

_OP = "routing_of_text"


class TextRouting(NamedTuple):
    """The tokens of a text with the strongest expert of each, as `routing_of_text` returns them.

    Attributes:
        title: what the report writes above the text.
        layer: the name of the layer, or "mean over N layers".
        experts: the names of all experts.
        tokens: the text of each token.
        chosen: the number of the strongest expert of each token.
        gates: the share of that expert.
    """

    title: str
    layer: str
    experts: list[str]
    tokens: list[str]
    chosen: list[int]
    gates: list[float]


def routing_of_text(
    model: nn.Module, ids: Tensor, decode: Any, *, layer: str | None = None, adapter: str | None = None, title: str = ""
) -> TextRouting:
    """Run a model on one sequence, and return the strongest expert of each token and its gate.

    The gates are those of `RoutingStats`. The model runs once, without gradients, in the mode in which it is. An open
    `RoutingStats` counts these tokens too.

    Args:
        model: a model with layers with experts, which is called as model(ids).
        ids: (S) or (1, S), the numbers of the tokens on the model's device.
        decode: a tokenizer, or a function from a list of one number to the text of that token.
        layer: the name of a layer in the plain model; None for the mean over all layers.
        adapter: the name of the adapter; None for the first that is active.
        title: what a report writes above the text.

    Returns:
        the tokens, the number of the strongest expert of each, and its gate.

    Raises:
        ValueError: ids are no sequence, there is no such layer, the layers or the adapter have not run, or layers with
            different experts should be averaged.
        TypeError: decode is neither a tokenizer nor a function.

    Example:
        stats.texts.append(routing_of_text(model, ids, tokenizer, title="A page of C"))
    """
    to_text: Callable[[list[int]], str] = getattr(decode, "decode", decode)
    if not callable(to_text):
        fail(_OP, "decode", "be a tokenizer or a function", type(decode).__name__, TypeError)
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or (ids.dim() == 2 and len(ids) != 1) or ids.numel() == 0:
        fail(_OP, "ids", "have shape (S) or (1, S)", tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__)
    layers = layers_with_experts(model)
    if not layers:
        fail(_OP, "model", "have layers with experts", "none")
    if layer is not None and layer not in layers:
        fail(_OP, "layer", f"name a layer with experts ({nearest(layer, layers)})", repr(layer))
    read = layers if layer is None else {layer: layers[layer]}
    found: list[tuple[list[str], Tensor]] = []
    with keeping(read), torch.no_grad():
        model(ids.reshape(1, -1))
        for one in read.values():
            kept = {name: t for name, t in one.kept_router_logits().items() if adapter in (None, name)}
            if kept:
                name, logits = next(iter(kept.items()))
                mixture = one.mixtures()[name]
                wide = logits.detach().flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
                share, _ = shares(wide, mixture.config.top_k, mixture.tensors.get("choice_bias"))
                found.append(([str(expert) for expert in mixture.config.names()], share.cpu().double()))
    if not found:
        argument, got = ("layer", "one that did not") if adapter is None else ("adapter", repr(adapter))
        fail(_OP, argument, "run in the forward of the model", got)
    experts = found[0][0]
    fitting = [share for names, share in found if names == experts and len(share) == ids.numel()]
    if len(fitting) != len(found):
        fail(_OP, "layer", "be given if layers differ in their experts or their tokens", "None")
    gates, chosen = torch.stack(fitting).mean(dim=0).max(dim=-1)
    of = layer if layer is not None else f"mean over {len(found)} layers"
    tokens = [to_text([number]) for number in ids.flatten().tolist()]
    return TextRouting(title, of, experts, tokens, chosen.tolist(), gates.tolist())
