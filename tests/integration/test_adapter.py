"""The two files of an adapter: interrupted saves, version 1, several adapters in one model, another model's adapter."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lmoe_kernels import LMoELinear, apply_lmoe, lmoe_layers, load_lmoe, save_lmoe
from tests.models import IDS, llama, state, with_experts

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def _trained(model: nn.Module, target: str, **options) -> nn.Module:
    apply_lmoe(model, target, num_experts=3, rank=2, **options)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def test_a_save_that_stops_between_the_files_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are never loaded with old options; once the file of old options is removed, they load with their own."""
    plain = llama()
    save_lmoe(with_experts(copy.deepcopy(plain), mixing="factors"), tmp_path)
    model = with_experts(copy.deepcopy(plain), mixing="outputs")
    replace = Path.replace

    def stop_at_the_second(self: Path, target: Path) -> Path:
        if self.name == "lmoe_config.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            save_lmoe(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lmoe.safetensors", "lmoe_config.json"]
    fresh = copy.deepcopy(plain)
    before = state(fresh)
    with pytest.raises(
        ValueError, match=r"got another: a save was interrupted or .* remove it to use lmoe.safetensors alone"
    ):
        load_lmoe(fresh, tmp_path)
    assert state(fresh) == before
    (tmp_path / "lmoe_config.json").unlink()
    load_lmoe(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def _as_version_1(folder: Path, alpha: float | None) -> None:
    config = json.loads((folder / "lmoe_config.json").read_text())
    kept = ("num_experts", "rank", "mixing", "top_k", "shared_a")
    layers = {name: {**{key: c[key] for key in kept}, "alpha": alpha} for name, c in config["layers"].items()}
    (folder / "lmoe_config.json").write_text(json.dumps({"format": "lmoe_kernels", "version": 1, "layers": layers}))
    save_file(load_file(folder / "lmoe.safetensors"), folder / "lmoe.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (6, 3.0)])
def test_files_of_version_1_keep_their_meaning(alpha: float | None, scaling: float, tmp_path: Path) -> None:
    plain = llama()
    model = _trained(copy.deepcopy(plain), "q_proj", alpha=2 * scaling, top_k=2)
    save_lmoe(model, tmp_path)
    _as_version_1(tmp_path, alpha)
    load_lmoe(plain, tmp_path)
    assert lmoe_layers(plain)[Q].scaling == scaling
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    load_lmoe(plain, tmp_path)  # once more, into the layers that are there now


def test_two_directories_into_one_model(tmp_path: Path) -> None:
    plain = llama()
    first, second = _trained(copy.deepcopy(plain), "q_proj"), _trained(copy.deepcopy(plain), "k_proj", mixing="outputs")
    save_lmoe(first, tmp_path / "first")
    save_lmoe(second, tmp_path / "second")
    names = load_lmoe(plain, [tmp_path / "first", str(tmp_path / "second")])
    assert set(names) == {*lmoe_layers(first), *lmoe_layers(second)} == set(lmoe_layers(plain))
    both = {**first.state_dict(), **second.state_dict()}
    layers = lmoe_layers(plain)
    assert all(torch.equal(layers[n].lora_b, both[f"{n}.lora_b"]) for n in names)
    load_lmoe(plain, (tmp_path / "second", tmp_path / "first"))
    with pytest.raises(ValueError, match=f"directory must hold the model's L-MoE layer '{K}', got 2 other layers"):
        load_lmoe(plain, tmp_path / "first")


@pytest.mark.parametrize("has_layers", [False, True], ids=["plain model", "model with layers"])
def test_two_directories_of_one_layer_clash(has_layers: bool, tmp_path: Path) -> None:
    model = _trained(llama(), "q_proj")
    for name in ("first", "second"):
        save_lmoe(model, tmp_path / name)
    target = model if has_layers else llama()
    before = state(target)
    with pytest.raises(ValueError) as caught:
        load_lmoe(target, [tmp_path / "first", tmp_path / "second"])
    got = f"two, the second {tmp_path / 'second'}"
    assert str(caught.value) == f"load_lmoe: layer {Q!r} must come from one directory, got {got}"
    assert state(target) == before
    with pytest.raises(ValueError, match="load_lmoe: directory must be one path or several, got none"):
        load_lmoe(target, [])


@pytest.mark.parametrize("directory", [None, 5, ["a", None]], ids=repr)
def test_a_directory_must_be_a_path(directory) -> None:
    with pytest.raises(TypeError) as caught:
        load_lmoe(llama(), directory)
    assert str(caught.value) == f"load_lmoe: directory must be one path or several, got {directory!r}"


def test_an_error_while_layers_are_made_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory may not suffice for the last layer."""
    save_lmoe(_trained(llama(), "q_proj"), tmp_path)
    model, made = llama(), []
    before, real = state(model), LMoELinear.from_config

    def fails_at_the_second(linear: nn.Module, *args, **options) -> LMoELinear:
        if made:
            raise MemoryError
        made.append(real(linear, *args, **options))
        return made[0]

    monkeypatch.setattr(LMoELinear, "from_config", fails_at_the_second)
    with pytest.raises(MemoryError):
        load_lmoe(model, tmp_path)
    assert made
    assert state(model) == before


def test_experts_of_gpt2s_convolutions_are_loaded(tmp_path: Path) -> None:
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    model = _trained(copy.deepcopy(plain), "c_attn")
    save_lmoe(model, tmp_path)
    load_lmoe(plain, tmp_path)
    assert torch.equal(plain(IDS).logits, model(IDS).logits)


def test_the_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its layers may have the same names and shapes as the layers of this model."""
    save_lmoe(_trained(llama(), "q_proj"), tmp_path)
    config = llama().config
    deeper = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 3}))
    wider = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "intermediate_size": 32}))
    for other in (deeper, wider):
        before = state(other)
        with pytest.raises(
            ValueError, match=r"model must have the linear layers of the one .*, got a model of other linear"
        ):
            load_lmoe(other, tmp_path)
        assert state(other) == before
    with pytest.raises(ValueError, match=f"got a model without its layer '{Q}'"):
        load_lmoe(nn.Sequential(nn.Linear(16, 16)), tmp_path)


def test_the_base_is_recognised_with_another_head_dtype_or_experts(tmp_path: Path) -> None:
    save_lmoe(_trained(llama(), "q_proj"), tmp_path)
    model = llama().bfloat16()
    model.resize_token_embeddings(40)
    load_lmoe(model, tmp_path)
    load_lmoe(model, tmp_path)


def _tied() -> nn.ModuleDict:
    linear = nn.Linear(4, 4)
    return nn.ModuleDict({"a": linear, "b": linear})


def test_two_trained_layers_do_not_become_one(tmp_path: Path) -> None:
    """A model that ties two layers holds one set of experts: one of two different sets would be lost."""
    apart = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    apply_lmoe(apart, "all-linear", num_experts=2, rank=1)
    save_lmoe(apart, tmp_path)
    tied = _tied()
    before = state(tied)
    with pytest.raises(
        ValueError, match="model must have two layers 'a' and 'b', got one shared layer for two different sets"
    ):
        load_lmoe(tied, tmp_path)
    assert state(tied) == before
    for key in ("lora_a", "lora_b", "gate_weight"):
        getattr(apart["b"], key).data.copy_(getattr(apart["a"], key))
    save_lmoe(apart, tmp_path)
    load_lmoe(tied, tmp_path)
    assert tied["a"] is tied["b"]
    assert torch.equal(tied["a"].lora_a, apart["b"].lora_a)


def test_an_adapter_is_json_and_safetensors(tmp_path: Path) -> None:
    """Other programs can read it."""
    save_lmoe(_trained(llama(), "q_proj"), tmp_path)
    config = json.loads((tmp_path / "lmoe_config.json").read_text())
    assert (config["format"], config["version"], config["modules_to_save"]) == ("lmoe_kernels", 2, [])
    assert config["layers"][Q]["num_experts"] == 3
    assert set(load_file(tmp_path / "lmoe.safetensors")) == {
        f"{name}.{key}" for name in config["layers"] for key in ("lora_a", "lora_b", "gate_weight")
    }
