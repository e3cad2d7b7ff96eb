"""The files of a checkpoint: how they are written, and damage that does not change the number of elements."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lmoe_kernels import apply_lmoe, lmoe_layers, load_lmoe, save_lmoe

WEIGHTS, CONFIG = "lmoe.safetensors", "lmoe_config.json"


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))


def _trained() -> nn.Module:
    model = _plain()
    apply_lmoe(model, "0", num_experts=3, rank=2, modules_to_save="1")
    nn.init.normal_(lmoe_layers(model)["0"].lora_b)
    return model


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_an_open_file_can_be_read_to_its_end_after_another_save(name: str, tmp_path: Path) -> None:
    """A save renames a new file into place and never overwrites the old one."""
    save_lmoe(_trained(), tmp_path)
    old = (tmp_path / name).read_bytes()
    other = _plain()
    apply_lmoe(other, ["0", "1"], num_experts=5, rank=3)
    with (tmp_path / name).open("rb") as reader:
        head = reader.read(8)
        save_lmoe(other, tmp_path)
        assert head + reader.read() == old
    assert (tmp_path / name).read_bytes() != old


def test_files_are_written_on_the_file_system_of_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's temporary folder may be full or on another file system, from which files cannot be renamed into place."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is no such folder"))
    save_lmoe(_trained(), tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {WEIGHTS, CONFIG}


def _change_tensor(directory: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with safe_open(directory / WEIGHTS, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata)


def _error_of_loading(directory: Path) -> str:
    """The message of the error that loading raises; the model must stay unchanged."""
    model = _plain()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_lmoe(model, directory)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "shape", "got"),
    [("0.lora_a", (3, 2, 16), (2, 3, 16)), ("0.gate_weight", (3, 16), (16, 3)), ("1.weight", (8, 12), (12, 8))],
)
def test_a_tensor_of_another_shape_with_as_many_elements(key: str, shape: Any, got: Any, tmp_path: Path) -> None:
    save_lmoe(_trained(), tmp_path)
    _change_tensor(tmp_path, key, lambda t: t.reshape(got))
    assert _error_of_loading(tmp_path) == f"load_lmoe: tensor {key!r} must have shape {shape}, got {got}"


@pytest.mark.parametrize("options", [None, 8, "rank", ["rank"]], ids=repr)
def test_options_of_a_layer_that_are_not_an_object(options: Any, tmp_path: Path) -> None:
    save_lmoe(_trained(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["layers"]["0"] = options
    (tmp_path / CONFIG).write_text(json.dumps(config))
    expected = f"load_lmoe: {tmp_path / CONFIG} must map the names of layers to their options, got {{'0': {options!r}}}"
    assert _error_of_loading(tmp_path) == expected


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_configuration_that_is_not_utf_8(encoding: str, tmp_path: Path) -> None:
    save_lmoe(_trained(), tmp_path)
    text = (tmp_path / CONFIG).read_text().replace('"format"', '"café": 0, "format"')
    (tmp_path / CONFIG).write_bytes(text.encode(encoding))
    assert _error_of_loading(tmp_path).startswith(
        f"load_lmoe: {tmp_path / CONFIG} must be JSON, got 'utf-8' codec can't decode"
    )
