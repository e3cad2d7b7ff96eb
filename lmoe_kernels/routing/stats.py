# SPDX-License-Identifier: Apache-2.0
"""`RoutingStats` adds up what the gates of a model do while it runs, on the model's device, without waiting for it."""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lmoe_kernels.auxiliary import MaskOfBatch
from lmoe_kernels.checks import fail
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.naming import wrapped_child
from lmoe_kernels.routing.keeping import keeping, shares
from lmoe_kernels.routing.masks import masks_of_forward
from lmoe_kernels.routing.sums import LayerSums, RoutingSums, check_labels
from lmoe_kernels.routing.text import TextRouting
from lmoe_kernels.targets import layers_with_experts

_OP = "RoutingStats"


class _Key(NamedTuple):
    """One adapter of one layer."""

    layer: str
    adapter: str


class _Group(NamedTuple):
    """Adapters whose tokens are added up in one operation, because all but their logits is the same."""

    keys: tuple[_Key, ...]
    experts: int
    device: torch.device


class RoutingStats:
    """Statistics of the router logits of all layers with experts of a model, while it runs within a `with` block.

    They count for every forward of the model: in training and evaluation, under autocast, and under `generate`. Nothing in
    the forward waits for the device. Layers need no `output_router_logits`: it is set within the block, and restored.

    Semantics:
        share = softmax of the router logits over the experts that the token keeps (all, or those of top_k)
        mean_gate = mean of share over the tokens;  load = share of the tokens that chose the expert (their top_k, or top 1)
        entropy_bits = mean over the tokens of the entropy of share
        experts_per_token = 2 ** entropy_bits;  effective_experts = 2 ** (entropy of mean_gate)
        label_bits = mutual information of label and expert, in bits, all labels equally likely

    Args:
        model: a model with `LMoELinear` layers or an adapter of `lmoe_kernels.peft`, plain or wrapped. It must be this model
            that runs, not a part of it.
        labels: names for kinds of text. The statistics are then also kept for each of them, see `label`.
        adapter: count this adapter alone; None for all that are active.

    Attributes:
        mask: (B, S) of bool or numbers, or None. Tokens with 0 do not count. None for the `attention_mask` (and
            `decoder_attention_mask`) that the model gets. A longer mask applies with its last columns, as with a KV cache.
        texts: results of `routing_of_text` that the report shows.

    Raises:
        ValueError: the model has no layers with experts or no such adapter, or two labels are equal.
        TypeError: an argument has the wrong type.

    Example:
        with RoutingStats(model, labels=["English", "C"]) as stats:
            with stats.label("English"):
                model(english)
            with stats.label("C"):
                model.generate(c)
        stats.save("routing")
    """

    def __init__(self, model: nn.Module, *, labels: Sequence[str] | None = None, adapter: str | None = None) -> None:
        if not isinstance(model, nn.Module):
            fail(_OP, "model", "be a torch.nn.Module", type(model).__name__, TypeError)
        self.labels = check_labels(_OP, labels)
        self._layers = layers_with_experts(model)
        if not self._layers:
            fail(_OP, "model", "have layers with experts", "none")
        adapters = {name: None for layer in self._layers.values() for name in layer.mixtures()}
        if adapter is not None and adapter not in adapters:
            fail(_OP, "adapter", f"be one of {', '.join(map(repr, adapters))}", repr(adapter))
        self.mask: Tensor | None = None
        self.texts: list[TextRouting] = []
        self._model, self._adapter = model, adapter
        self._label: int | Tensor = len(self.labels)
        self._configs: dict[tuple[_Key, int], LayerConfig] = {}
        self._sums: dict[_Group, Tensor] = {}  # (adapters of the group, labels + 1, features), the last label is none
        self._snapshots: list[tuple[int, dict[_Group, Tensor]]] = []
        self._counted: dict[_Key, weakref.ref[Tensor]] = {}
        self._running: ExitStack | None = None

    def start(self) -> None:
        """Start to count, as at the beginning of the `with` block. What was counted before stays.

        Raises:
            ValueError: it counts already.
        """
        if self._running is not None:
            fail(_OP, "start", "be called once before stop", "a second call")
        # Logits of an earlier forward do not count, even if a layer does not run and so still holds them.
        self._counted = {key: weakref.ref(logits) for key, logits in self._kept()}
        with ExitStack() as stack:
            stack.enter_context(keeping(self._layers))
            for hook in self._install():
                stack.callback(hook.remove)
            self._running = stack.pop_all()

    def stop(self) -> None:
        """Stop to count, as at the end of the `with` block: hooks and options are as before. May be called twice."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def __enter__(self) -> "RoutingStats":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @contextmanager
    def label(self, label: str | Tensor) -> Iterator[None]:
        """Give a label to the tokens of all forwards within the block.

        Args:
            label: one of `labels`; or the numbers (B) of those of each sequence, an integer tensor, best on the model's
                device. A number that is none of theirs, such as -1, means no label. If `generate` runs several beams for
                each sequence, they have its label.

        Raises:
            ValueError: it is not one of `labels`, or has more than one dimension; in forward, the number of sequences is
                another.
            TypeError: it is neither a str nor an integer tensor.
        """
        before, self._label = self._label, self._number_of(label)
        try:
            yield
        finally:
            self._label = before

    def snapshot(self, step: int) -> None:
        """Keep what was counted since the last snapshot, for the drift of the gates over the steps of a training.

        Args:
            step: number of the step, larger than that of the last snapshot.

        Raises:
            ValueError: the step is not larger.
            TypeError: the step is not an int.
        """
        if not isinstance(step, int) or isinstance(step, bool):
            fail(f"{_OP}.snapshot", "step", "be an int", type(step).__name__, TypeError)
        if self._snapshots and step <= self._snapshots[-1][0]:
            fail(f"{_OP}.snapshot", "step", f"be larger than that of the last snapshot, {self._snapshots[-1][0]}", step)
        self._snapshots.append((step, {group: sums.clone() for group, sums in self._sums.items()}))

    def sums(self) -> RoutingSums:
        """Read what was counted from the device, which waits for it.

        Returns:
            the sums over the tokens of each layer, in fp64 on the CPU. With several processes, those of this one.

        Raises:
            ValueError: no token was counted, or the number of experts of a layer has changed.
        """
        now = self._read(self._sums)
        counted = {key: sums for key, sums in now.items() if sums[:, -1].sum() > 0}
        if not counted:
            must = "have run since the statistics began (RoutingStats counts in its `with` block)"
            fail(_OP, "model", must, "no token")
        adapters = [key.layer for key in counted]
        names = {k: k.layer if adapters.count(k.layer) == 1 else f"{k.layer}.{k.adapter}" for k in counted}
        order = list(self._layers)
        layers = {}
        for key in sorted(counted, key=lambda key: order.index(key.layer)):
            experts = (counted[key].shape[1] - 2) // 2
            config = self._configs[key, experts]
            layers[names[key]] = LayerSums([str(name) for name in config.names()], config.top_k, counted[key])
        snapshots, before = [], {}
        for step, sums in self._snapshots:
            total = self._read(sums)
            since = {key: total[key] - before[key] if key in before else total[key] for key in total}
            snapshots.append((step, {names[key]: t for key, t in since.items() if key in names and t[:, -1].sum() > 0}))
            before = total
        return RoutingSums(self.labels, layers, snapshots, list(self.texts))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Compute the statistics, see `RoutingSums.summary`. This waits for the device."""
        return self.sums().summary()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the statistics to a directory, see `RoutingSums.save`. This waits for the device."""
        self.sums().save(directory)

    def _read(self, sums: Mapping[_Group, Tensor]) -> dict[_Key, Tensor]:
        """The sums of each adapter on the CPU. A layer can be in several groups, which differ in what ran with it."""
        totals: dict[_Key, Tensor] = {}
        for group, of_group in sums.items():
            for key, one in zip(group.keys, of_group.to("cpu", torch.float64), strict=True):
                if key in totals and totals[key].shape != one.shape:
                    got = " and ".join(str((t.shape[1] - 2) // 2) for t in (totals[key], one))
                    fail(_OP, f"{key.layer!r}", "keep its number of experts while it is counted", got)
                totals[key] = totals[key] + one if key in totals else one
        return totals

    def _number_of(self, label: str | Tensor) -> int | Tensor:
        op = f"{_OP}.label"
        if isinstance(label, str):
            if label not in self.labels:
                fail(op, "label", f"be one of the labels {', '.join(map(repr, self.labels)) or '(none)'}", repr(label))
            return self.labels.index(label)
        if not isinstance(label, Tensor) or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            got = label.dtype if isinstance(label, Tensor) else type(label).__name__
            fail(op, "label", "be a str or an integer tensor", got, TypeError)
        if label.dim() != 1 or not self.labels:
            must = "have shape (B), one number for each sequence" if self.labels else "be used with RoutingStats(labels=...)"
            fail(op, "label", must, tuple(label.shape))
        none = len(self.labels)
        return torch.where((label >= 0) & (label < none), label, none).long()

    def _install(self) -> Iterator[Any]:
        """Register a hook on the model and on all wrappers around it.

        PEFT's tuners call `forward` of the model directly, and its `generate` bypasses their own; a forward whose logits an
        inner hook has counted is not counted again. Inside of torch.compile's wrapper its own hook counts.
        """
        chain = [self._model]
        while (name := wrapped_child(chain[-1])) is not None:
            chain.append(chain[-1].get_submodule(name))
        compiled = [hasattr(module, "_orig_mod") for module in chain]
        names: list[str] = []
        for i in reversed(range(len(chain))):
            parameters = signature(chain[i].forward).parameters.values()
            names = [p.name for p in parameters if p.kind == Parameter.POSITIONAL_OR_KEYWORD] or names
            yield chain[i].register_forward_hook(self._hook(names, inside_compiled=any(compiled[:i])), with_kwargs=True)

    def _hook(self, names: Sequence[str], inside_compiled: bool) -> Any:
        count = cast(Any, torch.compiler.disable)(self._count)

        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not (inside_compiled and torch.compiler.is_compiling()):
                count({**dict(zip(names, args, strict=False)), **keywords})

        return hook

    def _kept(self) -> Iterator[tuple[_Key, Tensor]]:
        for name, layer in self._layers.items():
            for adapter, logits in layer.kept_router_logits().items():
                if self._adapter is None or adapter == self._adapter:
                    yield _Key(name, adapter), logits

    def _config(self, key: _Key, experts: int) -> LayerConfig:
        """The options of an adapter. They are read once for each number of experts, because that takes time."""
        if (key, experts) not in self._configs:
            self._configs[key, experts] = self._layers[key.layer].mixtures()[key.adapter].config
        return self._configs[key, experts]

    def _count(self, batch: dict[str, Any]) -> None:
        """Add up the tokens of the forward that has just ended."""
        with torch.inference_mode(False), torch.no_grad():  # sums made in inference mode could not be changed outside of it
            masks: MaskOfBatch | None = None
            groups: dict[Any, tuple[list[_Key], list[Tensor], Tensor | None]] = {}
            fitting = self.mask is None
            for key, logits in self._kept():
                seen = self._counted.get(key)
                if seen is not None and seen() is logits:
                    continue  # the layer has not run again, like the encoder in a step of generate
                self._counted[key] = weakref.ref(logits)
                masks = masks or masks_of_forward(self._model, batch, self.mask)
                mask = masks.of_layer(key.layer, logits)
                fitting = fitting or mask is not None
                config = self._config(key, logits.shape[-1])
                same = logits.shape, logits.dtype, logits.device, config.top_k, config.choice_bias, id(mask)
                keys, several, _ = groups.setdefault(same, ([], [], mask))
                keys.append(key)
                several.append(logits)
            if groups and not fitting:
                shown = " or ".join(sorted({str(tuple(same[0][:-1])) for same in groups}))
                got = tuple(self.mask.shape) if self.mask is not None else None
                fail(_OP, "mask", f"have the shape {shown} of the tokens", got)
            for keys, several, mask in groups.values():
                self._add(tuple(keys), torch.stack(several), mask, batch.get("past_key_values") is not None)

    def _add(self, keys: tuple[_Key, ...], logits: Tensor, mask: Tensor | None, cached: bool) -> None:
        """Add the tokens of adapters, whose logits are stacked (adapters, ..., E), to their sums."""
        config = self._config(keys[0], logits.shape[-1])
        label = self._labels_of(logits.shape[1:], cached)
        rows = 1 if isinstance(label, int) else len(label)
        experts, device = logits.shape[-1], logits.device
        logits = logits.reshape(len(keys), rows, -1, experts)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        bias = None
        if config.choice_bias:
            biases = [self._layers[key.layer].mixtures()[key.adapter].tensors["choice_bias"] for key in keys]
            bias = torch.stack(biases)[:, None, None]
        share, chosen = shares(logits, config.top_k, bias)
        entropy = torch.special.entr(share).sum(dim=-1, keepdim=True)
        features = torch.cat([share, chosen, entropy, torch.ones_like(entropy)], dim=-1)
        if mask is not None:
            counts = mask.to(device, non_blocking=True).reshape(rows, -1, 1) > 0
            features = torch.where(counts, features, 0)
        group = _Group(keys, experts, device)
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        of_sequences = features.sum(dim=2).to(wide)
        if group not in self._sums:
            self._sums[group] = torch.zeros(len(keys), len(self.labels) + 1, features.shape[-1], dtype=wide, device=device)
        if isinstance(label, int):
            self._sums[group][:, label] += of_sequences[:, 0]
        else:
            self._sums[group].index_add_(1, label.to(device, non_blocking=True), of_sequences)

    def _labels_of(self, shape: torch.Size, cached: bool) -> int | Tensor:
        """The number of the label of all sequences, or those of each of them."""
        label = self._label
        if isinstance(label, int):
            return label
        sequences, given = shape[0], len(label)
        beams = sequences // given if given and sequences % given == 0 else 0
        if len(shape) == 2 and beams:  # the tokens of all sequences in one dimension
            return label
        if sequences != given and not (cached and beams):  # only with a cache several beams come from a sequence
            fail(f"{_OP}.label", "label", f"have one number for each of {sequences} sequences", given)
        return label if sequences == given else label[:, None].expand(-1, beams).reshape(-1)
