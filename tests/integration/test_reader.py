"""read_lmoe: what a directory holds, without a model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmoe_kernels import apply_lmoe, lmoe_layers, read_lmoe, save_lmoe
from lmoe_kernels.config import CONFIG_KEYS
from tests.models import llama, with_experts

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 5, "top_k": 2, "shared_a": True, "gate_bias": True}, {"choice_bias": True, "top_k": 1}],
    ids=str,
)
def test_options_and_tensors_are_those_of_the_model(options: dict, tmp_path: Path) -> None:
    model = with_experts(llama(), **options)
    save_lmoe(model, tmp_path)
    read, layers = read_lmoe(tmp_path), lmoe_layers(model)
    assert list(read.layers) == list(layers)
    assert read.modules_to_save == {}
    for name, (config, tensors) in read.layers.items():
        layer = layers[name]
        assert {key: getattr(config, key) for key in CONFIG_KEYS} == layer.config()
        assert read.layers[name].features == (layer.in_features, layer.out_features)
        assert tensors.keys() == layer.shapes().keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, getattr(layer, key))


def test_routers_and_modules_to_save(tmp_path: Path) -> None:
    model = llama()
    apply_lmoe(model, ["q_proj", "k_proj"], num_experts=3, rank=2, router="group", modules_to_save="lm_head")
    save_lmoe(model, tmp_path)
    read = read_lmoe(tmp_path)
    assert set(read.layers[Q].tensors) == {"lora_a", "lora_b", "router.gate_weight"}
    assert set(read.layers[Q.replace("q_proj", "k_proj")].tensors) == {"lora_a", "lora_b"}
    assert set(read.modules_to_save) == {"lm_head.weight"}


def test_the_digest_depends_on_options_and_shapes_alone(tmp_path: Path) -> None:
    base = llama()

    def digest(**options) -> str:
        model = with_experts(copy.deepcopy(base), **options)
        save_lmoe(model, tmp_path)
        return read_lmoe(tmp_path).digest

    first = digest()
    assert digest() == first  # other random numbers
    assert digest(mixing="outputs") != first
    assert digest(alpha=5) != first
    apply_lmoe(base, "up_proj", num_experts=2, rank=2)
    assert digest() != first


def test_a_digest_of_another_process_is_the_same(tmp_path: Path) -> None:
    # written down once: a digest that depended on hashes of this process or on the order of keys would differ
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=2)
    save_lmoe(model, tmp_path)
    assert read_lmoe(tmp_path).digest[:16] == "b39f940fcb828aeb"


def _change_tensors(directory: Path, change) -> None:
    tensors, text = load_file(directory / "lmoe.safetensors"), (directory / "lmoe_config.json").read_text()
    change(tensors)
    save_file(tensors, directory / "lmoe.safetensors", metadata={"format": "pt", "lmoe_config": text})


BROKEN = {
    "none of A": (lambda t: t.pop(f"{Q}.lora_a"), f"lmoe.safetensors must hold '{Q}.lora_a', got none of that name"),
    "no gate": (lambda t: t.pop(f"{Q}.gate_weight"), f"lmoe.safetensors must hold '{Q}.gate_weight', got none of that name"),
    "A without dimensions": (
        lambda t: t.update({f"{Q}.lora_a": torch.tensor(1.0)}),
        f"tensor '{Q}.lora_a' must have shape (3, 2, 0), got ()",
    ),
    "another rank": (
        lambda t: t.update({f"{Q}.lora_b": torch.zeros(3, 4, 16)}),
        f"tensor '{Q}.lora_b' must have shape (3, 2, 16), got (3, 4, 16)",
    ),
    "integers": (
        lambda t: t.update({f"{Q}.lora_b": torch.zeros(3, 2, 16, dtype=torch.int8)}),
        f"tensor '{Q}.lora_b' must have one of the dtypes "
        "torch.float32, torch.bfloat16, torch.float16, torch.float64, got torch.int8",
    ),
    "something else": (
        lambda t: t.update({"other": torch.zeros(1)}),
        "lmoe.safetensors must hold only tensors of its layers and modules_to_save, got 1 unknown: 'other'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(case: str, tmp_path: Path) -> None:
    save_lmoe(with_experts(llama()), tmp_path)
    change, message = BROKEN[case]
    _change_tensors(tmp_path, change)
    with pytest.raises(ValueError) as error:
        read_lmoe(tmp_path)
    assert str(error.value) == f"read_lmoe: {message}"


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    save_lmoe(with_experts(llama()), tmp_path)
    config = json.loads((tmp_path / "lmoe_config.json").read_text())
    config["layers"][Q]["top_k"] = 9
    (tmp_path / "lmoe_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "lmoe.safetensors")
    save_file(tensors, tmp_path / "lmoe.safetensors", metadata={"format": "pt", "lmoe_config": json.dumps(config)})
    with pytest.raises(ValueError, match=rf"^read_lmoe: layer '{Q}': top_k must be in 1 \.\. E = 3, got 9$"):
        read_lmoe(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^read_lmoe: .*lmoe\.safetensors does not exist$"):
        read_lmoe(tmp_path)
