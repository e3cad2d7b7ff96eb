# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a forward count: the masks that the model gets, or that the user has set."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lmoe_kernels.auxiliary import MaskOfBatch, mask_of_batch


def masks_of_forward(model: nn.Module, batch: Mapping[str, Any], given: Tensor | None) -> MaskOfBatch:
    """The masks of the tokens of one forward: the last columns, because with a KV cache masks cover more tokens.

    Args:
        model: the model.
        batch: the arguments of its forward by name.
        given: the mask that the user has set, which replaces those of the batch.
    """
    of_encoder = _length(batch, "input_ids", "inputs_embeds")
    of_decoder = _length(batch, "decoder_input_ids", "decoder_inputs_embeds")
    if given is not None:
        mask = _last(given, of_decoder or of_encoder)
        return MaskOfBatch(mask, mask)
    found = mask_of_batch(model, batch)
    encoder = _last(found.encoder, of_encoder)
    # a decoder alone has one mask for both
    return MaskOfBatch(encoder, encoder if found.decoder is found.encoder else _last(found.decoder, of_decoder))


def _length(batch: Mapping[str, Any], *names: str) -> int | None:
    """The number of tokens in each sequence of this forward."""
    given = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
    return given.shape[1] if given is not None and given.dim() >= 2 else None


def _last(mask: Any, length: int | None) -> Tensor | None:
    """The last columns of a mask (B, S). A mask of another kind, which some caches need, is not read."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        warnings.warn(  # Python shows it once for each place of the code
            "RoutingStats: an attention mask that is no tensor (B, S) is not read, so every token counts, padding included; "
            "set stats.mask to leave tokens out.",
            stacklevel=2,
        )
        return None
    return mask if length is None or mask.shape[1] <= length else mask[:, mask.shape[1] - length :]
