# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the two files of a checkpoint: tensors as safetensors, options as JSON. Neither file contains code.

`lmoe.safetensors` is authoritative: its metadata contain the configuration that its tensors were saved with.
`lmoe_config.json` is a readable copy of that configuration. If the two differ, a save was interrupted or the file was
edited. Loading then raises an error, because tensors must never be used with the options of another save.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor

from lmoe_kernels.checks import fail
from lmoe_kernels.config import CONFIG_KEYS
from lmoe_kernels.files import parsed_json, read_tensors, read_text, safetensors, shortened

WEIGHTS, CONFIG = "lmoe.safetensors", "lmoe_config.json"
FORMAT = "lmoe_kernels"
FORMAT_VERSION = 2
# Defaults of options that are newer than this format version. An option is written only if it differs from its default,
# so that older releases of the package can read files that do not use it.
_LATER_DEFAULTS: dict[str, Any] = {
    "gate_bias": False, "choice_bias": False, "expert_names": None, "router": "layer", "router_reads": "token"
}  # fmt: skip
_CONFIG_IN_METADATA = "lmoe_config"
_CONFIG_OF_PEFT = "adapter_config.json"


class Adapter(NamedTuple):
    """The experts, the gates and the other trained modules of a model. Keys are names in the plain model."""

    layers: dict[str, dict[str, Any]]  # the options of each L-MoE layer, as returned by `LMoELinear.config`
    tensors: dict[str, Tensor]  # "<layer>.lora_a", "<layer>.router.gate_weight" and so on; all those of modules_to_save
    modules_to_save: list[str]
    base: str | None  # digest of the names and sizes of the model's linear layers; None in files of version 1


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter) -> None:
    """Write the two files to a temporary directory and rename each into place, so that readers never see a partial file."""
    save_file = safetensors("save_lmoe").save_file
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "base": adapter.base,
        "modules_to_save": adapter.modules_to_save,
        "layers": {name: without_later_defaults(options) for name, options in adapter.layers.items()},
    }
    text = json.dumps(config, indent=2) + "\n"
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".lmoe-", dir=target) as partial:  # on the same file system, where renaming is atomic
        save_file(adapter.tensors, Path(partial, WEIGHTS), metadata={"format": "pt", _CONFIG_IN_METADATA: text})
        Path(partial, CONFIG).write_text(text, encoding="utf-8")
        for file in (WEIGHTS, CONFIG):
            Path(partial, file).replace(target / file)


def read_adapter(op: str, directory: str | os.PathLike[str]) -> Adapter:
    """Read the files that `write_adapter` wrote, in this format version or the previous one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file was not written by `write_adapter`, or the two files come from different saves.
    """
    weights, shown = Path(directory, WEIGHTS), Path(directory, CONFIG)
    if not weights.is_file() and not shown.is_file() and Path(directory, _CONFIG_OF_PEFT).is_file():
        got = f"a PEFT adapter (peft.PeftModel.from_pretrained loads it): {directory}"
        fail(op, "directory", "hold what save_lmoe wrote", got)
    if not weights.is_file():
        raise FileNotFoundError(f"{op}: {weights} does not exist")
    tensors, metadata = read_tensors(op, weights)
    text = metadata.get(_CONFIG_IN_METADATA)
    shown_text = read_text(op, shown) if shown.is_file() else None
    if text is None:  # version 1 kept the options only in the JSON file
        if shown_text is None:
            raise FileNotFoundError(f"{op}: {shown} does not exist")
        config = _parsed(op, shown, shown_text)
        if config["version"] != 1:
            fail(op, f"{weights}", "hold the configuration that it was saved with", "none: save again")
        return Adapter(
            {name: _upgraded_from_version_1(options) for name, options in config["layers"].items()}, tensors, [], None
        )
    config = _parsed(op, weights, text)
    if shown_text is not None and _parsed(op, shown, shown_text) != config:
        got = f"another: a save was interrupted or the file was edited; remove it to use {WEIGHTS} alone"
        fail(op, f"{shown}", f"hold the configuration that {WEIGHTS} was saved with", got)
    layers = {name: {**_LATER_DEFAULTS, **options} for name, options in config["layers"].items()}
    return Adapter(layers, tensors, config["modules_to_save"], config["base"])


def without_later_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a file of this format version lists."""
    return {name: value for name, value in options.items() if name not in _LATER_DEFAULTS or value != _LATER_DEFAULTS[name]}


def _upgraded_from_version_1(options: dict[str, Any]) -> dict[str, Any]:
    """Convert a layer's options to version 2: in version 1, alpha=None meant a scaling of 1, and top_k renormalised."""
    later = {"renormalize": True, **_LATER_DEFAULTS}
    upgraded = {**options, **later} if options.keys() == set(CONFIG_KEYS) - later.keys() else options
    return {**upgraded, "alpha": upgraded.get("rank")} if "alpha" in upgraded and upgraded["alpha"] is None else upgraded


def _parsed(op: str, path: Path, text: str) -> dict[str, Any]:
    """Parse the configuration and check its top-level entries."""
    config = parsed_json(op, path, text)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else config
        fail(op, f"{path}", f"have format {FORMAT!r}", shortened(got))
    version = config.get("version")
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        fail(op, f"{path}", f"have version 1 or {FORMAT_VERSION}", shortened(version))
    layers = config.get("layers")
    if not isinstance(layers, dict) or not layers or not all(isinstance(c, dict) for c in layers.values()):
        fail(op, f"{path}", "map the names of layers to their options", shortened(layers))
    if version == 1:
        return config
    saved, base = config.get("modules_to_save"), config.get("base")
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        fail(op, f"{path}", "list the names of modules_to_save", shortened(saved))
    if not isinstance(base, str):
        fail(op, f"{path}", "have the digest of the base model as 'base'", shortened(base))
    return config
