"""What a checkpoint holds, and its two files: tensors as safetensors, options as JSON, never code.

`lmoe.safetensors` decides: its metadata hold the configuration that its tensors were saved under. `lmoe_config.json` has the
same text for people and programs that want to look. Where it differs, a save was interrupted or the file was edited, and
nothing is loaded: tensors are never read under the options of another save.
"""

import json
import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from lmoe_kernels.checks import fail
from lmoe_kernels.config import CONFIG_KEYS

WEIGHTS, CONFIG = "lmoe.safetensors", "lmoe_config.json"
FORMAT = "lmoe_kernels"
FORMAT_VERSION = 2
# Options that layers got after this version was first written: they are written where they differ from this.
_ADDED: dict[str, Any] = {"gate_bias": False}
_CONFIG_IN_METADATA = "lmoe_config"
_CONFIG_OF_PEFT = "adapter_config.json"


class Adapter(NamedTuple):
    """Experts and gates of a model, and what else was trained with them, by names in the plain model."""

    layers: dict[str, dict[str, Any]]  # the options of each L-MoE layer, as `LMoELinear.config` gives them
    tensors: dict[str, Tensor]  # "<layer>.lora_a" and so on, and all tensors of the modules in `modules_to_save`
    modules_to_save: list[str]
    base: str | None  # digest of the frozen model's shapes; None in files of version 1


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter) -> None:
    """Write the two files. Each is complete or not there: it takes its name when it is written."""
    save_file = safetensors("save_lmoe").save_file
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "base": adapter.base,
        "modules_to_save": adapter.modules_to_save,
        "layers": {name: _without_added(options) for name, options in adapter.layers.items()},
    }
    text = json.dumps(config, indent=2) + "\n"
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".lmoe-", dir=target) as partial:  # in the target: a file is renamed, never copied
        save_file(adapter.tensors, Path(partial, WEIGHTS), metadata={"format": "pt", _CONFIG_IN_METADATA: text})
        Path(partial, CONFIG).write_text(text, encoding="utf-8")
        for file in (WEIGHTS, CONFIG):
            Path(partial, file).replace(target / file)


def read_adapter(op: str, directory: str | os.PathLike[str]) -> Adapter:
    """Read what `write_adapter` wrote, of this format version or the one before.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what `write_adapter` writes, or the two are of different saves.
    """
    weights, shown = Path(directory, WEIGHTS), Path(directory, CONFIG)
    if not weights.is_file() and not shown.is_file() and Path(directory, _CONFIG_OF_PEFT).is_file():
        got = f"a PEFT adapter (peft.PeftModel.from_pretrained loads it): {directory}"
        fail(op, "directory", "hold what save_lmoe wrote", got)
    if not weights.is_file():
        raise FileNotFoundError(f"{op}: {weights} does not exist")
    tensors, metadata = _read_tensors(op, weights)
    text = metadata.get(_CONFIG_IN_METADATA)
    beside = _read_text(op, shown) if shown.is_file() else None
    if text is None:  # version 1: the options stood in the other file alone
        if beside is None:
            raise FileNotFoundError(f"{op}: {shown} does not exist")
        config = _parsed(op, shown, beside)
        if config["version"] != 1:
            fail(op, f"{weights}", "hold the configuration that it was saved with", "none: save again")
        return Adapter({name: _of_version_1(options) for name, options in config["layers"].items()}, tensors, [], None)
    config = _parsed(op, weights, text)
    if beside is not None and _parsed(op, shown, beside) != config:
        got = f"another: a save was interrupted, or the file edited; remove it to go by {WEIGHTS} alone"
        fail(op, f"{shown}", f"hold the configuration that {WEIGHTS} was saved with", got)
    layers = {name: {**_ADDED, **options} for name, options in config["layers"].items()}
    return Adapter(layers, tensors, config["modules_to_save"], config["base"])


def safetensors(op: str) -> ModuleType:
    """The library, or how to get it."""
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"{op}: safetensors must be installed: pip install safetensors") from error


def _without_added(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _ADDED or value != _ADDED[name]}


def _of_version_1(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a layer as version 2 has them: in version 1 alpha=None was a scaling of 1, and top_k renormalised."""
    later = {"renormalize": True, **_ADDED}
    upgraded = {**options, **later} if options.keys() == set(CONFIG_KEYS) - later.keys() else options
    return {**upgraded, "alpha": upgraded.get("rank")} if "alpha" in upgraded and upgraded["alpha"] is None else upgraded


def _read_text(op: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        fail(op, f"{path}", "be JSON", _first_line(error))


def _parsed(op: str, path: Path, text: str) -> dict[str, Any]:
    """The configuration, its outer form checked."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, integers or nesting without end
        fail(op, f"{path}", "be JSON", _first_line(error))
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else config
        fail(op, f"{path}", f"say format {FORMAT!r}", _shortened(got))
    version = config.get("version")
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        fail(op, f"{path}", f"be of version {FORMAT_VERSION} or 1", _shortened(version))
    layers = config.get("layers")
    if not isinstance(layers, dict) or not layers or not all(isinstance(c, dict) for c in layers.values()):
        fail(op, f"{path}", "map layers to their options", _shortened(layers))
    if version == 1:
        return config
    saved, base = config.get("modules_to_save"), config.get("base")
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        fail(op, f"{path}", "list the names of modules_to_save", _shortened(saved))
    if not isinstance(base, str):
        fail(op, f"{path}", "say the digest of its base", _shortened(base))
    return config


def _read_tensors(op: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    safe_open = safetensors(op).safe_open
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except Exception as error:  # safetensors raises its own SafetensorError, which it does not export everywhere
        fail(op, f"{path}", "be a safetensors file", _first_line(error))


def _first_line(error: Exception) -> str:
    return _shortened(str(error).partition("\n")[0], str)


def _shortened(value: object, show: Any = repr) -> str:
    """A value as an error shows it: one line, of bearable length."""
    try:
        text = show(value)
    except (ValueError, RecursionError):  # integers or nesting without end
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 200 else f"{text[:200]}..."
