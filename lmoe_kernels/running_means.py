# SPDX-License-Identifier: Apache-2.0
"""The running mean of each sequence up to each token: of batches that are padded or packed, and in steps with a cache.

Where a sequence begins, and which tokens are padding, follows from what transformers passes to a model and to its blocks:
the attention mask, position_ids, and the cache of keys and values. `Sequences` reads them by hooks. The sums that a
generation continues from are kept on the cache: they are reordered, copied and freed with it.

Sums are float64, where the device has it: a document at the end of a long packed row is the difference of two long sums,
and a generation adds to one sum for many steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmoe_kernels.checks import fail

_SUMS = "_lmoe_sums"  # an attribute of a cache: the sums of each router by its key
_following: dict[type, type] = {}  # a class of caches, and the class that keeps the sums in its order


class Sums(NamedTuple):
    """What a router has read of the sequences in a cache."""

    rows: Tensor  # (B, H), the sum of the rows of each sequence, in float64
    tokens: Tensor  # (B, 1), how many these were
    length: int  # tokens that the cache held afterwards, padding included


class Sequences:
    """Where the sequences of the current forward begin, which of its tokens are padding, and the cache that they are in."""

    def __init__(self) -> None:
        # None where the model does not say; then a sequence begins with the batch, and nothing is padding
        self.mask: Tensor | None = None  # (B, S) or longer with a cache, 0 for padding
        self.positions: Tensor | None = None  # (B, S) or (1, S), 0 at the first token of a sequence
        self.cache: Any = None
        self.paged = False  # whether the tokens are those of transformers' continuous batching
        self.length: int | None = None  # tokens in the cache before this forward, padding included; None: not known
        self.handles: list[Any] = []

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward of the module that holds the blocks."""
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.positions, self.cache = None, None
        self.paged = kwargs.get("cache") is not None
        self.length = _length(kwargs.get("past_key_values"))

    def enter_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the forward of a block."""
        positions = kwargs.get("position_ids")
        self.positions = positions if isinstance(positions, Tensor) and positions.dim() == 2 else None
        # some models pass it without its name
        self.cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)

    def leave_model(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A hook after the forward of that module: keep no cache. Recomputed blocks need the mask and the positions."""
        self.cache, self.length = None, None

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Compute means in between the forwards of the routers, without a trace in the cache of the current forward."""
        cache, self.cache = self.cache, None
        try:
            yield
        finally:
            self.cache = cache

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tensors of the last forward out of copies."""
        return {"mask": None, "positions": None, "cache": None, "paged": False, "length": None, "handles": self.handles}

    def running_means(self, rows: Tensor, key: str) -> Tensor:
        """For each token the mean of the rows of its sequence up to itself.

        Args:
            rows: (B, S, H) in fp32 or fp64.
            key: the router's, under which a cache keeps its sums.

        Returns:
            (B, S, H).

        Raises:
            ValueError: the rows are not those of sequences or not of those in the cache, or the cache holds tokens that the
                router has not read.
        """
        if rows.dim() != 3:
            fail("Router", "x", "have shape (B, S, H) where router_reads='prefix'", tuple(rows.shape))
        if self.paged:  # a batch has parts of several sequences, and the cache keeps no sums
            fail("Router", "router_reads", "be 'token' in continuous batching", "'prefix'")
        before = None if self.cache is None else _sums_before(self.cache, key, self.length)
        if before is not None and before.rows.shape[0] != rows.shape[0]:
            must = f"have as many rows as the cache has sequences, {before.rows.shape[0]}"
            fail("Router", "x", must, rows.shape[0])
        padding = self._padding(rows)
        own = rows if padding is None else rows.masked_fill(padding, 0)
        own = own if rows.device.type == "mps" else own.double()
        weights = own.new_ones(*rows.shape[:2], 1)
        weights = weights if padding is None else weights.masked_fill(padding, 0)
        sums, counts = own.cumsum(dim=1), weights.cumsum(dim=1)
        if before is not None:
            sums, counts = sums + before.rows[:, None], counts + before.tokens[:, None]
        if self.positions is not None:
            sums, counts = self._since_the_start(own, weights, sums, counts)
        if self.cache is not None:
            length = rows.shape[1] + (0 if before is None else before.length)
            _keep(self.cache, key, Sums(sums[:, -1].detach(), counts[:, -1], length))
        return (sums * counts.clamp(min=1).reciprocal()).to(rows.dtype)  # unlike a division, a product saves no sums

    def _padding(self, rows: Tensor) -> Tensor | None:
        """(B, S, 1), true for padding, or None. With a cache, the mask has the tokens before these too."""
        batch, length, _ = rows.shape
        mask = self.mask
        if mask is None or mask.shape[0] != batch or mask.shape[1] < length:
            return None
        return (mask[:, mask.shape[1] - length :] == 0).to(rows.device)[:, :, None]

    def _since_the_start(self, own: Tensor, weights: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Take away what came before the last token with position 0, up to each token."""
        assert self.positions is not None
        batch, length, _ = own.shape
        places = torch.arange(length, device=own.device)
        starts = torch.where(self.positions.to(own.device) == 0, places, -1)
        start = starts.cummax(dim=1).values.expand(batch, length)[:, :, None]
        at, has_start = start.clamp(min=0), start >= 0

        def since(sum_of: Tensor, of_token: Tensor) -> Tensor:
            earlier = (sum_of - of_token).gather(1, at.expand_as(sum_of))
            return sum_of - torch.where(has_start, earlier, 0)

        return since(sums, own), since(counts, weights)


def _sums_before(cache: Any, key: str, length: int | None) -> Sums | None:
    """The sums of the tokens that the cache held before this forward; None if it was empty."""
    before = getattr(cache, _SUMS, {}).get(key)
    known = 0 if before is None else before.length
    if length is not None and length != known:
        reasons = "a cropped cache, one of another model, or router='group' under torch.compile"
        got = f"a cache of {length} tokens, of which it has read {known} ({reasons})"
        fail("Router", "router_reads='prefix'", "have read all tokens in the cache", got)
    return before if known else None


def _length(cache: Any) -> int | None:
    """How many tokens a cache holds, 0 without one; None where it does not say so without waiting for the device."""
    if cache is None:
        return 0
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    return length if isinstance(length, int) else None


def _keep(cache: Any, key: str, sums: Sums) -> None:
    """Keep sums on a cache, whose class becomes one that does to them what it does to keys and values."""
    if not isinstance(cache, _Following):
        kind = type(cache)
        if kind not in _following:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            _following[kind] = type(kind.__name__, (_Following, kind), names)
        cache.__class__ = _following[kind]
    kept = vars(cache).setdefault(_SUMS, {})
    before: Sums | None = kept.get(key)
    if before is not None and _takes(before.rows, sums.rows):
        # In place, since the memory of a compiled graph's result is written again in its next step.
        kept[key] = Sums(before.rows.copy_(sums.rows), before.tokens.copy_(sums.tokens), sums.length)
    else:
        # Copies, since the sums given are views that would keep those of all tokens alive.
        kept[key] = Sums(sums.rows.clone(), sums.tokens.clone(), sums.length)


def _takes(kept: Tensor, rows: Tensor) -> bool:
    """Whether rows can be copied to a tensor that is kept."""
    same = kept.shape == rows.shape and kept.device == rows.device
    return same and kept.is_inference() == torch.is_inference_mode_enabled()


class _Following:
    """What transformers does to the sequences of a cache, done to the sums as well."""

    def reorder_cache(self, beam_idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Put the sequences into another order, in a beam search."""
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))
        return super().reorder_cache(beam_idx, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def batch_repeat_interleave(self, repeats: int, *args: Any, **kwargs: Any) -> Any:
        """Repeat each sequence."""
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))
        return super().batch_repeat_interleave(repeats, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def batch_select_indices(self, indices: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep some of the sequences."""
        self._change(lambda t: t[indices.to(t.device)])
        return super().batch_select_indices(indices, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        """Empty the cache."""
        vars(self).pop(_SUMS, None)
        return super().reset(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _change(self, function: Any) -> None:
        of_cache = vars(self).get(_SUMS, {})
        for key, sums in of_cache.items():
            of_cache[key] = sums._replace(rows=function(sums.rows), tokens=function(sums.tokens))
