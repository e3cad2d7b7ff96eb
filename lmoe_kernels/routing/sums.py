# SPDX-License-Identifier: Apache-2.0
"""`RoutingSums`: what `RoutingStats` has counted, the statistics that follow from it, and its two files."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmoe_kernels.checks import fail
from lmoe_kernels.files import parsed_json, read_tensors, safetensors, shortened
from lmoe_kernels.routing.text import TextRouting

TENSORS, READABLE = "routing.safetensors", "routing.json"
FORMAT, VERSION = "lmoe_kernels.routing", 1
_IN_METADATA = "routing"


class LayerSums(NamedTuple):
    """The sums of one layer over its tokens."""

    experts: list[str]  # their names
    top_k: int | None
    # (labels + 1, 2 E + 2) in fp64; the last row is of tokens without a label. The columns are the sums of the E shares, of
    # the E choices, of the entropy in nats, and of ones.
    sums: Tensor


@dataclass(frozen=True)
class RoutingSums:
    """What `RoutingStats` has counted; `load_stats` reads it from files.

    Attributes:
        labels: the names of the labels.
        layers: the sums of each layer, by its name in the plain model. If several adapters of a layer were counted, the
            names are "<name of the layer>.<name of the adapter>".
        snapshots: for each snapshot its step, and the sums since the snapshot before.
        texts: texts with the strongest expert of each token.
    """

    labels: list[str]
    layers: dict[str, LayerSums]
    snapshots: list[tuple[int, dict[str, Tensor]]]
    texts: list[TextRouting]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Compute the statistics.

        Returns:
            for each layer a dict of `experts` (names), `top_k`, `tokens`, `mean_gate` (E), `load` (E), `entropy_bits`,
            `experts_per_token` and `effective_experts`, see `RoutingStats`. With labels also `labels`, a dict with the same
            from `tokens` on for each label that has tokens, and `label_bits`, or None for less than two such labels.
        """
        return {name: self._of_layer(layer) for name, layer in self.layers.items()}

    def drift(self) -> list[dict[str, Any]]:
        """Compute the mean gates between the snapshots.

        Returns:
            for each snapshot a dict of `step` and `mean_gate`: by layer, the mean gate (E) since the snapshot before.
        """
        return [
            {"step": step, "mean_gate": {name: _statistics(sums.sum(dim=0))["mean_gate"] for name, sums in of_step.items()}}
            for step, of_step in self.snapshots
        ]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write two files. `routing.safetensors` has all that `load_stats` reads; `routing.json` is for people and programs.

        Both are renamed into place, so that a reader never sees a part of one.

        Args:
            directory: is created if it does not exist.

        Raises:
            ImportError: safetensors is not installed.
        """
        save_file = safetensors("RoutingStats.save").save_file
        tensors = {f"sums.{name}": layer.sums.contiguous() for name, layer in self.layers.items()}
        for i, (_, of_step) in enumerate(self.snapshots):
            tensors |= {f"snapshot.{i}.{name}": sums.contiguous() for name, sums in of_step.items()}
        config = {
            "format": FORMAT,
            "version": VERSION,
            "labels": self.labels,
            "layers": {name: {"experts": layer.experts, "top_k": layer.top_k} for name, layer in self.layers.items()},
            "steps": [step for step, _ in self.snapshots],
            "texts": [text._asdict() for text in self.texts],
        }
        readable = {"format": FORMAT, "version": VERSION, "summary": self.summary(), "drift": self.drift()}
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".routing-", dir=target) as partial:  # on the same file system, so renaming is atomic
            save_file(tensors, Path(partial, TENSORS), metadata={"format": "pt", _IN_METADATA: json.dumps(config)})
            Path(partial, READABLE).write_text(json.dumps(readable, indent=2) + "\n", encoding="utf-8")
            for file in (TENSORS, READABLE):
                Path(partial, file).replace(target / file)

    def _of_layer(self, layer: LayerSums) -> dict[str, Any]:
        result = {"experts": layer.experts, "top_k": layer.top_k, **_statistics(layer.sums.sum(dim=0))}
        if not self.labels:
            return result
        by_label = {name: row for name, row in zip(self.labels, layer.sums, strict=False) if row[-1] > 0}
        result["labels"] = {name: _statistics(row) for name, row in by_label.items()}
        gates = [torch.tensor(of_label["mean_gate"], dtype=torch.float64) for of_label in result["labels"].values()]
        result["label_bits"] = information_bits(torch.stack(gates)) if len(gates) > 1 else None
        return result


def information_bits(gates: Tensor) -> float:
    """How much the choice of an expert tells about the label: mutual information in bits, all labels equally likely.

    Args:
        gates: (labels, E), mean gates, rows that sum to one.
    """
    return max(0.0, _bits(gates.mean(dim=0)) - sum(map(_bits, gates)) / len(gates))


def _bits(shares: Tensor) -> float:
    """The entropy of shares that sum to one, in bits."""
    return torch.special.entr(shares).sum().item() / math.log(2)


def _statistics(sums: Tensor) -> dict[str, Any]:
    """The statistics of the tokens whose sums (2 E + 2) these are."""
    experts, tokens = (len(sums) - 2) // 2, sums[-1].item()
    means = sums / tokens
    bits = means[-2].item() / math.log(2)
    return {
        "tokens": round(tokens),
        "mean_gate": means[:experts].tolist(),
        "load": means[experts : 2 * experts].tolist(),
        "entropy_bits": bits,
        "experts_per_token": 2**bits,
        "effective_experts": 2 ** _bits(means[:experts]),
    }


def check_labels(op: str, labels: Sequence[str] | None) -> list[str]:
    """Check the names of labels, and return them as a list."""
    if labels is None:
        return []
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(name, str) for name in labels):
        fail(op, "labels", "be a list of str", shortened(labels), TypeError)
    if len(set(labels)) != len(labels):
        fail(op, "labels", "be different from one another", shortened(list(labels)))
    return list(labels)


def load_stats(directory: str | os.PathLike[str]) -> RoutingSums:
    """Read the statistics that `RoutingStats.save` has written.

    Args:
        directory: the directory.

    Returns:
        the sums, whose `summary` has the statistics.

    Raises:
        FileNotFoundError: the directory has no statistics.
        ValueError: the file is damaged or of another kind.
        ImportError: safetensors is not installed.
    """
    op, path = "load_stats", Path(directory, TENSORS)
    if not path.is_file():
        raise FileNotFoundError(f"{op}: {path} does not exist: RoutingStats.save writes it")
    tensors, metadata = read_tensors(op, path)
    if _IN_METADATA not in metadata:
        fail(op, f"{path}", "hold routing statistics", "a safetensors file of another kind")
    config = parsed_json(op, path, metadata[_IN_METADATA])
    if not isinstance(config, dict) or (config.get("format"), config.get("version")) != (FORMAT, VERSION):
        got = (config.get("format"), config.get("version")) if isinstance(config, dict) else config
        fail(op, f"{path}", f"have format {FORMAT!r}, version {VERSION}", shortened(got))
    try:
        layers = {
            name: LayerSums(list(options["experts"]), options["top_k"], tensors[f"sums.{name}"])
            for name, options in config["layers"].items()
        }
        snapshots = [
            (step, {name: tensors[f"snapshot.{i}.{name}"] for name in layers if f"snapshot.{i}.{name}" in tensors})
            for i, step in enumerate(config["steps"])
        ]
        result = RoutingSums(list(config["labels"]), layers, snapshots, [TextRouting(**text) for text in config["texts"]])
    except (KeyError, TypeError, AttributeError) as error:
        fail(op, f"{path}", "hold routing statistics", shortened(error))
    for name, layer in layers.items():
        shape = len(result.labels) + 1, 2 * len(layer.experts) + 2
        if layer.sums.shape != shape:
            fail(op, f"{path}", f"hold sums of shape {shape} for {name!r}", tuple(layer.sums.shape))
    return result
