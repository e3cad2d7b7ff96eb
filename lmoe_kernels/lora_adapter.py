# SPDX-License-Identifier: Apache-2.0
"""Reads and writes plain LoRA adapters in PEFT's format: tensors as safetensors, options as JSON, without importing PEFT.

A LoRA is plain if it adds scaling * B(A(x)) to the outputs of linear layers, and changes nothing else. Options that change
what is computed are refused by name, and so are options that this module does not know, unless they are empty.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmoe_kernels.checks import DTYPES, check_finite, check_positive_int, fail
from lmoe_kernels.files import parsed_json, read_tensors, read_text, safetensors, shortened
from lmoe_kernels.naming import plain_key

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLE, _WEIGHTS_OF_LMOE = "adapter_model.bin", "lmoe.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_[AB]\.weight")
_ENDS_IN = r"(?:.*\.)?(?:{})$"  # how PEFT matches a key of rank_pattern and alpha_pattern with the name of a layer
# Options that decide which layers have a LoRA, how it was initialised or trained, or which base model it belongs to. The
# tensors show the result of the first ones, and the others do not change what a trained LoRA computes.
_WITHOUT_EFFECT = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
    )
)  # fmt: skip
_READ = frozenset(
    (
        "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora",
    )
)  # fmt: skip
# The values of init_lora_weights that leave the base weights as they are; the others need base weights of their own.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")


class LoraLayer(NamedTuple):
    """The LoRA of one linear layer: it adds scaling * B(A(x)) to the output."""

    a: Tensor  # (R, I)
    b: Tensor  # (O, R)
    scaling: float


class LoraAdapter(NamedTuple):
    """The LoRAs of a model by the names of their layers in the plain model, and the recorded name of the base model."""

    layers: dict[str, LoraLayer]
    base: str | None


def read_lora(op: str, directory: str | os.PathLike[str]) -> LoraAdapter:
    """Read a plain LoRA that PEFT's `save_pretrained` or `write_lora` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: `directory` is not a path.
        ValueError: a file is damaged or of another kind, or the adapter is not a plain LoRA.
        ImportError: safetensors is not installed.
    """
    if not isinstance(directory, str | os.PathLike):
        fail(op, "an adapter", "be the path of a directory", repr(directory), TypeError)
    weights, file = Path(directory, WEIGHTS), Path(directory, CONFIG)
    if not file.is_file():
        if Path(directory, _WEIGHTS_OF_LMOE).is_file():
            fail(op, f"{directory}", "hold a LoRA of PEFT", "what save_lmoe wrote (load_lmoe loads it)")
        raise FileNotFoundError(f"{op}: {file} does not exist")
    config = parsed_json(op, file, read_text(op, file))
    if not isinstance(config, dict):
        fail(op, f"{file}", "be the configuration of a PEFT adapter", shortened(config))
    config = {"r": 8, "lora_alpha": 8, **config}  # PEFT's own defaults
    _check_plain(op, file, config)
    if not weights.is_file():
        if Path(directory, _PICKLE).is_file():
            got = f"{_PICKLE}, which may contain code: load it with PEFT and save it again"
            fail(op, f"{directory}", f"hold {WEIGHTS}", got)
        raise FileNotFoundError(f"{op}: {weights} does not exist")
    pairs = _pairs(op, weights, read_tensors(op, weights)[0])
    base = config.get("base_model_name_or_path")
    layers = {plain_key(name): LoraLayer(a, b, _scaling(op, file, config, name, a)) for name, (a, b) in pairs.items()}
    return LoraAdapter(layers, base if isinstance(base, str) and base else None)


def write_lora(op: str, directory: str | os.PathLike[str], adapter: LoraAdapter) -> None:
    """Write a LoRA that `peft.PeftModel.from_pretrained` loads.

    Both files are written to a temporary directory and renamed into place. An older configuration is removed first, so that
    tensors are never found next to the ranks and scalings of another save.
    """
    save_file = safetensors(op).save_file
    tensors = {
        f"{_PREFIX}{name}{key}": tensor.detach().cpu().contiguous().clone()  # save_file refuses tensors that share memory
        for name, layer in adapter.layers.items()
        for key, tensor in ((_A, layer.a), (_B, layer.b))
    }
    text = json.dumps(_config(adapter), indent=2) + "\n"
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".lora-", dir=target) as partial:  # on the same file system, where renaming is atomic
        save_file(tensors, Path(partial, WEIGHTS), metadata={"format": "pt"})
        Path(partial, CONFIG).write_text(text, encoding="utf-8")
        (target / CONFIG).unlink(missing_ok=True)
        for file in (WEIGHTS, CONFIG):
            Path(partial, file).replace(target / file)


def _config(adapter: LoraAdapter) -> dict[str, Any]:
    """The options for PEFT. The most common rank and alpha are those of the adapter, the others stand in the patterns."""
    ranks = {name: layer.a.shape[0] for name, layer in adapter.layers.items()}
    alphas = {name: alpha_of(layer.scaling, ranks[name]) for name, layer in adapter.layers.items()}
    rank, alpha = (_most_common(values) for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(adapter.layers),
        # PEFT matches a key as a regular expression at the end of a name
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
    }


def alpha_of(scaling: float, rank: int) -> float:
    """The alpha for which PEFT's alpha / rank is this scaling: to the last bit, if the scaling is such a quotient."""
    alpha = scaling * rank
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    listed = list(values.values())
    return max(listed, key=listed.count)


def _check_plain(op: str, file: Path, config: dict[str, Any]) -> None:
    """Check that the options describe a plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        fail(op, f"peft_type in {file}", "be 'LORA'", shortened(kind))
    if config.get("bias", "none") not in ("none", None):
        fail(op, f"bias in {file}", "be 'none', because a plain LoRA has no biases", shortened(config["bias"]))
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | None) and str(start).lower() not in _PLAIN_STARTS:
        got = f"{shortened(start)} (save_pretrained(path_initial_model_for_weight_conversion=...) converts it)"
        fail(op, f"init_lora_weights in {file}", "be one that does not change the base weights", got)
    for name, value in config.items():
        if value and name not in _WITHOUT_EFFECT and name not in _READ:
            fail(op, f"{shortened(name)} in {file}", "be empty, as in a plain LoRA", shortened(value))
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(op, f"{name} in {file}", config.get(name) or {})
    if not isinstance(config.get("use_rslora", False), bool):
        fail(op, f"use_rslora in {file}", "be true or false", shortened(config["use_rslora"]))


def _check_pattern(op: str, argument: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        fail(op, argument, "map names of layers to numbers", shortened(pattern))
    for key in pattern:
        try:
            re.compile(_ENDS_IN.format(key))
        except (re.error, RecursionError, OverflowError):
            fail(op, argument, "have regular expressions as keys", shortened(key))


def _pairs(op: str, file: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors A and B of every layer. Every tensor of the file must belong to such a pair."""
    names = dict.fromkeys(found[1] for key in tensors if (found := _KEY.fullmatch(key)))
    known = [f"{_PREFIX}{name}{end}" for name in names for end in (_A, _B)]
    if missing := next((key for key in known if key not in tensors), None):
        fail(op, f"{file}", f"hold {missing!r}", "none of that name")
    if unknown := next((key for key in tensors if key not in known), None):
        hint = (
            "" if "lora_" in unknown else " (save_pretrained(save_embedding_layers=False) leaves embeddings and heads out)"
        )
        fail(op, f"{file}", "hold the lora_A and lora_B of linear layers alone", f"{unknown!r}{hint}")
    if not names:
        fail(op, f"{file}", "hold the lora_A and lora_B of at least one layer", "no tensors")
    pairs = {name: (tensors[f"{_PREFIX}{name}{_A}"], tensors[f"{_PREFIX}{name}{_B}"]) for name in names}
    for name, (a, b) in pairs.items():
        _check_pair(op, f"of layer {name!r} in {file}", a, b)
    return pairs


def _check_pair(op: str, where: str, a: Tensor, b: Tensor) -> None:
    for letters, key, tensor in (("(R, I)", "lora_A", a), ("(O, R)", "lora_B", b)):
        if tensor.dim() != 2:
            got = f"{tuple(tensor.shape)}, as for a convolution" if tensor.dim() > 2 else tuple(tensor.shape)
            fail(op, f"{key} {where}", f"have shape {letters}", got)
        if tensor.dtype not in DTYPES:
            fail(op, f"{key} {where}", f"have one of the dtypes {', '.join(map(str, DTYPES))}", tensor.dtype)
    if a.shape[0] < 1 or a.shape[0] != b.shape[1]:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        fail(op, f"lora_A and lora_B {where}", "have shapes (R, I) and (O, R) with R >= 1", got)


def _scaling(op: str, file: Path, config: dict[str, Any], name: str, a: Tensor) -> float:
    """The factor of a layer: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    rank = _of_layer(config.get("rank_pattern") or {}, name, config["r"])
    alpha = _of_layer(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    where = f"of layer {name!r} in {file}"
    try:
        check_positive_int(op, f"the rank {where}", rank)
        check_finite(op, f"the alpha {where}", alpha, "be a finite number")
    except TypeError as error:  # the type of a value in a file, not of an argument
        raise ValueError(str(error)) from None
    if rank != a.shape[0]:
        fail(op, f"lora_A {where}", f"have the rank {rank} of {CONFIG}", a.shape[0])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_layer(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value for a layer: that of the first key that matches the end of the name from a segment on, as in PEFT."""
    found = next((key for key in pattern if re.match(_ENDS_IN.format(key), name)), name)
    return pattern.get(found, default)


def check_fits(op: str, where: str, lora: LoraLayer, in_features: int, out_features: int) -> None:
    """Check that a LoRA has the features of a linear layer."""
    got = lora.a.shape[1], lora.b.shape[0]
    if got != (in_features, out_features):
        must = f"have the layer's in_features and out_features {(in_features, out_features)}"
        fail(op, f"the LoRA {where}", must, got)


def expert_of(lora: LoraLayer, rank: int, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A LoRA as the A (R, I) and the B (R, O) of an expert of at least its rank; the ranks that it does not have are zero.

    The LoRA's scaling becomes a factor of B, next to the scaling of the expert's layer. B is rounded once to `dtype`.
    """
    missing = 0, 0, 0, rank - lora.a.shape[0]
    b = (lora.b.double() * (lora.scaling / scaling)).T
    return nn.functional.pad(lora.a.to(dtype), missing), nn.functional.pad(b.to(dtype), missing)


def lora_of(a: Tensor, b: Tensor, scaling: float) -> LoraLayer | None:
    """An expert with A (R, I) and B (R, O) as a LoRA, without the ranks that are zero; None if all are."""
    used = (a != 0).any(dim=1) | (b != 0).any(dim=1)
    return LoraLayer(a[used], b[used].T, scaling) if used.any() else None
