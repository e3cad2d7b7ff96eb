"""PEFT's LoRA directories: reading agrees with what PEFT computes, PEFT loads what is written, and the rest is refused."""

import copy
import json
import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lmoe_kernels.lora_adapter import LoraAdapter, LoraLayer, alpha_of, read_lora, write_lora
from tests.models import IDS, llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
    "rsLoRA": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"], "lora_dropout": 0.3},
    "defaults": {"target_modules": "all-linear"},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*\.(q_proj|v_proj|up_proj)",
        "rank_pattern": {"q_proj": 4, r"layers\.1\.self_attn.v_proj": 1, "proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 11, "1.mlp.up_proj": 0.5},
    },
    "patterns with rsLoRA": {
        "r": 2,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"q_proj": 7},
    },
    "a few layers": {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


def lora(model: nn.Module, **options: Any) -> PeftModel:
    """A LoRA whose A and B are random."""
    wrapped = get_peft_model(model, LoraConfig(**options)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def saved(directory: Path, **options: Any) -> PeftModel:
    options.setdefault("target_modules", ["q_proj"])
    model = lora(llama(), **options)
    model.save_pretrained(directory)
    return model


def applied(model: nn.Module, adapter: LoraAdapter) -> Tensor:
    """The logits of a model to whose weights the LoRAs are added."""
    model = copy.deepcopy(model)
    for name, (a, b, scaling) in adapter.layers.items():
        weight = model.get_submodule(name).weight
        delta = scaling * (b.to(weight) @ a.to(weight))
        weight.data += delta.T if type(model) is GPT2LMHeadModel else delta
    return model(IDS).logits


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_is_read_is_what_peft_computes(kind: str, tmp_path: Path) -> None:
    plain = llama()
    model = lora(copy.deepcopy(plain), **OPTIONS[kind])
    model.save_pretrained(tmp_path)
    adapter = read_lora("op", str(tmp_path))
    torch.testing.assert_close(applied(plain, adapter), model(IDS).logits, rtol=1e-9, atol=1e-9)
    for name, layer in adapter.layers.items():
        assert layer.scaling == model.base_model.model.get_submodule(name).scaling["default"]


@pytest.mark.parametrize("kind", OPTIONS)
def test_peft_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    plain = llama()
    model = lora(copy.deepcopy(plain), **OPTIONS[kind])
    model.save_pretrained(tmp_path / "first")
    adapter = read_lora("op", tmp_path / "first")
    write_lora("op", tmp_path / "second", adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing tensors
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "second").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert_same(read_lora("op", tmp_path / "second"), adapter)


def assert_same(first: LoraAdapter, second: LoraAdapter) -> None:
    assert first.base == second.base
    assert first.layers.keys() == second.layers.keys()
    for name, layer in first.layers.items():
        other = second.layers[name]
        assert torch.equal(layer.a, other.a)
        assert torch.equal(layer.b, other.b)
        assert layer.scaling == other.scaling


def test_an_adapter_of_gpt2s_convolutions(tmp_path: Path) -> None:
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).double().eval()
    model = lora(copy.deepcopy(plain), r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path)
    adapter = read_lora("op", tmp_path)
    assert tuple(adapter.layers["transformer.h.0.attn.c_attn"].b.shape) == (48, 3)
    torch.testing.assert_close(applied(plain, adapter), model(IDS).logits, rtol=1e-9, atol=1e-9)


def test_a_converted_pissa_is_a_plain_lora(tmp_path: Path) -> None:
    """PEFT converts it to a LoRA of the original weights, with twice the rank."""
    plain = llama().float()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(ValueError) as caught:
        read_lora("op", tmp_path / "raw")
    assert str(caught.value) == (
        f"op: init_lora_weights in {tmp_path / 'raw' / CONFIG} must be one that does not change the base weights, got "
        "'pissa' (save_pretrained(path_initial_model_for_weight_conversion=...) converts it)"
    )
    converted = read_lora("op", tmp_path / "plain")
    assert converted.layers[Q].a.shape[0] == 4
    torch.testing.assert_close(applied(plain, converted), model.eval()(IDS).logits, rtol=1e-5, atol=1e-5)


def test_names_without_the_segments_of_wrappers(tmp_path: Path) -> None:
    """PEFT keeps the segments of wrappers that were there before its own, and so do the keys of patterns."""
    model = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})})
    lora(model, r=2, target_modules=["a", "b"], alpha_pattern={"^_orig_mod.b": 6}).save_pretrained(tmp_path)
    adapter = read_lora("op", tmp_path)
    assert {name: layer.scaling for name, layer in adapter.layers.items()} == {"a": 4.0, "b": 3.0}


def test_the_recorded_base_model(tmp_path: Path) -> None:
    saved(tmp_path)
    change_config(tmp_path, base_model_name_or_path="meta/tiny")
    adapter = read_lora("op", tmp_path)
    assert adapter.base == "meta/tiny"
    write_lora("op", tmp_path, adapter)
    assert read_lora("op", tmp_path).base == "meta/tiny"


def change_config(directory: Path, **options: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **options}))


def change_tensors(directory: Path, **changes: Any) -> None:
    """Replace tensors; a key is the end of the tensor's name, without dots."""
    tensors = load_file(directory / WEIGHTS)
    for key, tensor in changes.items():
        tensors[f"base_model.model.{Q}.{key.replace('__', '.')}"] = tensor
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, directory / WEIGHTS)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "'use_dora' in {} must be empty, as in a plain LoRA, got True"),
    "QALoRA": ({"use_qalora": True}, "'use_qalora' in {} must be empty"),
    "aLoRA": (
        {"alora_invocation_tokens": [1, 2]},
        r"'alora_invocation_tokens' in {} must be empty, as in a plain LoRA, got",
    ),
    "lora_bias": ({"lora_bias": True}, "'lora_bias' in {} must be empty"),
    "biases": ({"bias": "all"}, "bias in {} must be 'none', because a plain LoRA has no biases, got 'all'"),
    "tokens": ({"trainable_token_indices": [3]}, "'trainable_token_indices' in {} must be empty"),
    "parameters": ({"target_parameters": ["experts.up"]}, "'target_parameters' in {} must be empty"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "'layer_replication' in {} must be empty"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "'arrow_config' in {} must be empty"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, "'use_bdlora' in {} must be empty"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "'kasa_config' in {} must be empty"),
    "VeLoRA": ({"velora_config": {"scale": 1.0}}, "'velora_config' in {} must be empty"),
    "Monte Carlo": ({"monteclora_config": {"num_samples": 8}}, "'monteclora_config' in {} must be empty"),
    "Megatron": ({"megatron_config": {"tp": 2}}, "'megatron_config' in {} must be empty"),
    "whole modules": ({"modules_to_save": ["score"]}, r"'modules_to_save' in {} must be empty, as in a plain LoRA, got"),
    "tied": ({"ensure_weight_tying": True}, "'ensure_weight_tying' in {} must be empty"),
    "line feed": ({"use\nit": 1}, r"'use\nit' in {} must be empty, as in a plain LoRA, got 1"),
    "newer": ({"use_sora": "fast"}, "'use_sora' in {} must be empty, as in a plain LoRA, got 'fast'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights in {} must be one that does not change the base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights in {} must be"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights in {} must be"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights in {} must be"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights in {} must be"),
    "IA3": ({"peft_type": "IA3"}, "peft_type in {} must be 'LORA', got 'IA3'"),
    "no type": ({"peft_type": None}, "peft_type in {} must be 'LORA', got None"),
    "rank": ({"r": 5}, f"lora_A of layer '{Q}' in {{}} must have the rank 5 of adapter_config.json, got 8"),
    "rank 0": ({"r": 0}, f"the rank of layer '{Q}' in {{}} must be at least 1, got 0"),
    "rank as text": ({"r": "8"}, f"the rank of layer '{Q}' in {{}} must be an int, got str"),
    "infinite alpha": ({"lora_alpha": math.inf}, f"the alpha of layer '{Q}' in {{}} must be a finite number, got inf"),
    "alpha as text": ({"alpha_pattern": {"q_proj": "8"}}, f"the alpha of layer '{Q}' in {{}} must be a finite number, got"),
    "pattern": ({"rank_pattern": {"q_proj(": 2}}, "rank_pattern in {} must have regular expressions as keys, got 'q_proj('"),
    "list": ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern in {} must map names of layers to numbers, got ['q_proj']"),
    "rsLoRA as text": ({"use_rslora": "yes"}, "use_rslora in {} must be true or false, got 'yes'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_lora_is_refused(kind: str, tmp_path: Path) -> None:
    saved(tmp_path)
    options, message = REFUSED[kind]
    change_config(tmp_path, **options)
    assert error_of(tmp_path).startswith(f"op: {message.format(tmp_path / CONFIG)}")


def error_of(directory: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError, TypeError)) as caught:
        read_lora("op", directory)
    message = str(caught.value)
    assert message.startswith("op: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [None, False, {}, [], ""], ids=repr)
def test_empty_options_of_other_versions_are_accepted(value: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    change_config(tmp_path, use_sora=value)
    assert set(read_lora("op", tmp_path).layers) == {Q, Q.replace("0", "1")}


TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "without B": ({"lora_B__weight": None}, f"must hold 'base_model.model.{Q}.lora_B.weight', got none of that name"),
    "of DoRA": ({"lora_magnitude_vector": torch.ones(16)}, f"got 'base_model.model.{Q}.lora_magnitude_vector'"),
    "embedding": ({"lora_embedding_A": torch.ones(8, 16)}, f"got 'base_model.model.{Q}.lora_embedding_A'"),
    "under the adapter's name": ({"lora_A__default__weight": torch.ones(8, 16)}, "lora_A.default.weight'"),
    "convolution": (
        {"lora_A__weight": torch.ones(8, 16, 3, 3)},
        "have shape (R, I), got (8, 16, 3, 3), as for a convolution",
    ),
    "vector": ({"lora_B__weight": torch.ones(8)}, "must have shape (O, R), got (8,)"),
    "other rank": ({"lora_B__weight": torch.ones(16, 4)}, "(R, I) and (O, R) with R >= 1, got (8, 16) and (16, 4)"),
    "no rank": (
        {"lora_A__weight": torch.ones(0, 16), "lora_B__weight": torch.ones(16, 0)},
        "with R >= 1, got (0, 16) and (16, 0)",
    ),
    "integers": ({"lora_A__weight": torch.ones(8, 16, dtype=torch.int8)}, "float64, got torch.int8"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_no_plain_lora_are_refused(kind: str, tmp_path: Path) -> None:
    saved(tmp_path)
    changes, message = TENSORS[kind]
    change_tensors(tmp_path, **changes)
    assert message in error_of(tmp_path)


def test_a_head_that_peft_saves_with_its_lora(tmp_path: Path) -> None:
    """Its frozen weight may be another one than that of the model."""
    lora(llama(), target_modules=["lm_head"]).save_pretrained(tmp_path)
    assert error_of(tmp_path).endswith(
        "got 'base_model.model.lm_head.base_layer.weight' "
        "(save_pretrained(save_embedding_layers=False) leaves embeddings and heads out)"
    )
    lora(llama(), target_modules=["lm_head"]).save_pretrained(tmp_path, save_embedding_layers=False)
    assert list(read_lora("op", tmp_path).layers) == ["lm_head"]


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file({}, tmp_path / WEIGHTS)
    assert error_of(tmp_path).endswith("must hold the lora_A and lora_B of at least one layer, got no tensors")


def test_missing_files_and_pickles(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none") == f"op: {tmp_path / 'none' / CONFIG} does not exist"
    saved(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    got = "adapter_model.bin, which may contain code: load it with PEFT and save it again"
    assert error_of(tmp_path) == f"op: {tmp_path} must hold {WEIGHTS}, got {got}"
    (tmp_path / "adapter_model.bin").unlink()
    assert error_of(tmp_path) == f"op: {tmp_path / WEIGHTS} does not exist"
    save_file({}, tmp_path / "lmoe.safetensors")
    (tmp_path / CONFIG).unlink()
    assert error_of(tmp_path) == f"op: {tmp_path} must hold a LoRA of PEFT, got what save_lmoe wrote (load_lmoe loads it)"
    assert error_of(None) == "op: an adapter must be the path of a directory, got None"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_every_truncation_is_one_clear_error(name: str, tmp_path: Path) -> None:
    write_lora("op", tmp_path, LoraAdapter({"a": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 0.5)}, None))
    whole = (tmp_path / name).read_bytes()
    for length in range(len(whole.rstrip())):
        (tmp_path / name).write_bytes(whole[:length])
        assert str(tmp_path / name) in error_of(tmp_path)


@pytest.mark.parametrize(
    "text", [b"null", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'"lora"'], ids=lambda text: repr(text[:6])
)
def test_a_configuration_of_another_kind(text: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    assert str(tmp_path / CONFIG) in error_of(tmp_path)


def test_random_damage_is_an_error_or_another_valid_adapter(tmp_path: Path) -> None:
    """A flipped bit in the numbers cannot be seen, but no damage may raise anything but one line of the package."""
    write_lora("op", tmp_path, LoraAdapter({"a": LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 0.5)}, None))
    for name in (WEIGHTS, CONFIG):
        whole = (tmp_path / name).read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= int(torch.randint(1, 256, ()))
            (tmp_path / name).write_bytes(damaged)
            with suppress(ValueError):
                read_lora("op", tmp_path)
                continue
            error_of(tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_an_interrupted_save_leaves_no_tensors_with_the_options_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, r=8, lora_alpha=1)
    replace = Path.replace

    def stop_at_the_second(self: Path, target: Path) -> Path:
        if self.name == CONFIG:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            write_lora("op", tmp_path, LoraAdapter({Q: LoraLayer(torch.ones(8, 16), torch.ones(16, 8), 0.5)}, None))
    assert error_of(tmp_path) == f"op: {tmp_path / CONFIG} does not exist"


def test_names_with_the_characters_of_regular_expressions(tmp_path: Path) -> None:
    """PEFT takes a key of a pattern as a regular expression, which must match this layer and no other."""
    layers = {
        name: LoraLayer(torch.randn(rank, 2), torch.randn(3, rank), scaling)
        for name, rank, scaling in (
            *(("a.0", 1, 0.1), ("b.a.0", 2, 0.3), ("a.b.c", 5, 0.1), ("aXb.c", 4, 0.7), ("a+b", 3, 1.7)),
            *(("d", 2, 0.7), ("e", 2, 0.7)),
        )
    }
    adapter = LoraAdapter(layers, None)
    write_lora("op", tmp_path, adapter)
    assert_same(read_lora("op", tmp_path), adapter)


def test_the_scaling_is_exact_to_the_last_bit() -> None:
    for alpha in torch.rand(2000, dtype=torch.float64).mul(100).tolist():
        for rank in (1, 3, 7, 16, 48, 100):
            scaling = alpha / rank
            assert alpha_of(scaling, rank) / rank == scaling
    assert alpha_of(2.0, 8) == 16
    assert isinstance(alpha_of(2.0, 8), int)


def test_the_folder_holds_two_files_and_tensors_may_share_memory(tmp_path: Path) -> None:
    both = torch.randn(2, 2, 3)
    write_lora("op", tmp_path / "new" / "folder", LoraAdapter({"a": LoraLayer(both[0], both[1].T, 1.0)}, None))
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {WEIGHTS, CONFIG}
    assert torch.equal(read_lora("op", tmp_path / "new" / "folder").layers["a"].a, both[0])
