"""LoRAs of PEFT as experts: at a one-hot gate the model gives what PEFT gives, and what does not fit is refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lmoe_kernels import (
    apply_lmoe,
    expert_names,
    export_expert,
    from_lora_adapters,
    lmoe_layers,
    load_lmoe,
    save_lmoe,
)
from lmoe_kernels.lora_adapter import read_lora
from tests.integration.test_lora_adapter import CONFIG, change_config, lora
from tests.models import IDS, llama, state
from tools.error_rule import complaint, errors

LORAS: dict[str, dict[str, Any]] = {
    "english": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "python": {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "c": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"v_proj": 1, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"q_proj": 9},
    },
}
Q = "model.layers.0.self_attn.q_proj"


def saved(model: nn.Module, directory: Path, loras: dict[str, dict[str, Any]] = LORAS) -> dict[str, Path]:
    """LoRAs with random A and B in PEFT's directories."""
    for name, options in loras.items():
        lora(copy.deepcopy(model), **options).save_pretrained(directory / name, save_embedding_layers=False)
    return {name: directory / name for name in loras}


def logits_of_peft(model: nn.Module, directory: Path) -> Tensor:
    return PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()(IDS).logits


def choose(model: nn.Module, name: str) -> None:
    """Set the gate of one expert to 1."""
    for layer in lmoe_layers(model).values():
        assert layer.gate_bias is not None
        layer.gate_weight.data.zero_()
        layer.gate_bias.data.copy_(torch.tensor([0.0 if other == name else -torch.inf for other in layer.expert_names]))


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_a_one_hot_gate_gives_what_peft_gives(top_k: int | None, tmp_path: Path) -> None:
    plain = llama()
    directories = saved(plain, tmp_path)
    model = copy.deepcopy(plain)
    names = from_lora_adapters(model, directories, top_k=top_k, renormalize=top_k != 1)
    assert names == [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert expert_names(model) == list(LORAS)
    for name, directory in directories.items():
        choose(model, name)
        torch.testing.assert_close(model(IDS).logits, logits_of_peft(plain, directory), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_rounding_is_that_of_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    """In one layer, against float64: PEFT's LoRA in the same dtype is the plain PyTorch of the error rule."""
    base = nn.Sequential(nn.Linear(48, 40)).to(dtype)
    loras = {name: {**options, "target_modules": ["0"]} for name, options in LORAS.items()}
    for name, options in loras.items():
        with_lora = lora(copy.deepcopy(base), **options)
        for parameter in with_lora.parameters():  # as they are after rounding, so that the truth knows the same numbers
            parameter.data = parameter.to(dtype).float()
        with_lora.save_pretrained(tmp_path / name)
    model, x = copy.deepcopy(base), torch.randn(256, 48, dtype=dtype)
    from_lora_adapters(model, [tmp_path / name for name in loras])
    for name in loras:
        choose(model, name)
        in_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, autocast_adapter_dtype=False).eval()
        true = PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path / name).double().eval()(x.double())
        assert complaint(model(x), errors(in_peft(x), true), true, dtype) is None


def test_the_scaling_is_a_factor_of_b_that_is_rounded_once(tmp_path: Path) -> None:
    plain = llama().float()
    directories = saved(plain, tmp_path)
    from_lora_adapters(plain, directories)
    for index, (name, scaling) in enumerate((("english", 3 / 2), ("python", 7 / 5**0.5), ("c", 9 / 4))):
        b = read_lora("op", directories[name]).layers[Q].b
        mine = lmoe_layers(plain)[Q].lora_b[index, : b.shape[1]]
        assert torch.equal(mine, (scaling * b.double()).float().T)


def test_at_the_start_the_loras_are_averaged(tmp_path: Path) -> None:
    plain = llama()
    loras = {name: {**options, "target_modules": ["lm_head"]} for name, options in LORAS.items()}
    directories = saved(plain, tmp_path, loras)
    model = copy.deepcopy(plain)
    assert from_lora_adapters(model, directories.values()) == ["lm_head"]
    mean = sum(logits_of_peft(plain, directory) for directory in directories.values()) / len(directories)
    torch.testing.assert_close(model(IDS).logits, mean, rtol=1e-10, atol=1e-10)


def test_ranks_are_padded_with_zeros_that_training_does_not_change(tmp_path: Path) -> None:
    plain = llama()
    directories = saved(plain, tmp_path)
    from_lora_adapters(plain, directories)
    assert {lmoe_layers(plain)[Q].rank, lmoe_layers(plain)["model.layers.1.mlp.up_proj"].rank} == {5, 6}
    optimizer = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        plain(IDS, labels=IDS).loss.backward()
        optimizer.step()
    layer = lmoe_layers(plain)[Q]
    assert not layer.lora_a[0, 2:].any()
    assert not layer.lora_b[0, 2:].any()
    assert layer.lora_b[0, :2].all()
    only_c = lmoe_layers(plain)["model.layers.0.self_attn.o_proj"]
    assert not only_c.lora_b[:2].any()
    assert only_c.lora_b[2].all()


def test_all_ranks_can_be_made_larger(tmp_path: Path) -> None:
    plain = llama()
    directories = saved(plain, tmp_path)
    model = copy.deepcopy(plain)
    with pytest.raises(
        ValueError, match=r"rank must be at least 6, the largest rank of the LoRAs of layer '.*up_proj', got 5"
    ):
        from_lora_adapters(model, directories, rank=5)
    from_lora_adapters(model, directories, rank=8)
    assert {(layer.rank, layer.scaling) for layer in lmoe_layers(model).values()} == {(8, 1.0)}
    choose(model, "c")
    torch.testing.assert_close(model(IDS).logits, logits_of_peft(plain, directories["c"]), rtol=1e-10, atol=1e-10)


def test_the_gate_starts_equal_but_random_with_top_k(tmp_path: Path) -> None:
    directories = saved(llama(), tmp_path)
    for options, equal in (({}, True), ({"top_k": 2}, False), ({"gate_init_std": 0.5}, False)):
        model = llama()
        from_lora_adapters(model, directories, **options)
        assert all(layer.gate_weight.any() != equal for layer in lmoe_layers(model).values())
        assert all(layer.gate_bias is not None and not layer.gate_bias.any() for layer in lmoe_layers(model).values())
    model = llama()
    from_lora_adapters(model, directories, gate_bias=False, output_router_logits=True, dropout=0.1, dtype=torch.float32)
    layer = lmoe_layers(model)[Q]
    assert (layer.gate_bias, layer.output_router_logits, layer.dropout, layer.mixing) == (None, True, 0.1, "outputs")
    assert layer.lora_a.dtype == torch.float32


def test_only_experts_and_gates_are_trained(tmp_path: Path) -> None:
    model = llama()
    from_lora_adapters(model, saved(llama(), tmp_path))
    trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_a", "lora_b", "gate_weight", "gate_bias"}


def test_exported_again_peft_loads_them_and_agrees(tmp_path: Path) -> None:
    plain = llama()
    directories = saved(plain, tmp_path)
    model = copy.deepcopy(plain)
    from_lora_adapters(model, directories)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of PEFT about missing tensors
        for name, directory in directories.items():
            export_expert(model, name, tmp_path / "again" / name)
            again = logits_of_peft(plain, tmp_path / "again" / name)
            torch.testing.assert_close(again, logits_of_peft(plain, directory), rtol=1e-10, atol=1e-10)
    config = json.loads((tmp_path / "again" / "english" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert sorted(config["target_modules"]) == sorted(
        name for name, _ in plain.named_modules() if name.endswith(("q_proj", "down_proj"))
    )
    second = copy.deepcopy(plain)
    from_lora_adapters(second, [tmp_path / "again" / name for name in LORAS])
    for name, layer in lmoe_layers(second).items():
        assert torch.equal(layer.lora_a, lmoe_layers(model)[name].lora_a)
        assert torch.equal(layer.lora_b, lmoe_layers(model)[name].lora_b)


def test_names_travel_with_a_checkpoint(tmp_path: Path) -> None:
    plain = llama()
    model = copy.deepcopy(plain)
    from_lora_adapters(model, saved(plain, tmp_path))
    save_lmoe(model, tmp_path / "mixture")
    again = copy.deepcopy(plain)
    load_lmoe(again, tmp_path / "mixture")
    assert expert_names(again) == list(LORAS)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_loras_of_gpt2s_convolutions(tmp_path: Path) -> None:
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).double().eval()
    directories = saved(plain, tmp_path, {"a": {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}})
    model = copy.deepcopy(plain)
    assert from_lora_adapters(model, directories) == ["transformer.h.0.attn.c_attn"]
    torch.testing.assert_close(model(IDS).logits, logits_of_peft(plain, directories["a"]), rtol=1e-10, atol=1e-10)


def test_a_layer_of_two_names_gets_one_set_of_experts(tmp_path: Path) -> None:
    linear = nn.Linear(4, 4)
    tied = nn.ModuleDict({"a": linear, "b": linear})
    lora(copy.deepcopy(tied), r=2, target_modules=["a"]).save_pretrained(tmp_path)
    assert from_lora_adapters(tied, {"first": tmp_path}) == ["a"]
    assert tied["a"] is tied["b"]
    assert tied["a"].num_experts == 1


def test_two_loras_for_a_layer_of_two_names(tmp_path: Path) -> None:
    apart = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lora(apart, r=2, target_modules=["a", "b"]).save_pretrained(tmp_path)
    linear = nn.Linear(4, 4)
    assert error_of(nn.ModuleDict({"a": linear, "b": linear}), {"first": tmp_path}).endswith(
        "must be the only one of its layer, got a second one, under another name of the layer"
    )


def error_of(model: nn.Module, adapters: Any, **options: Any) -> str:
    """The error, which must be one line and leave the model unchanged."""
    before = state(model)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        from_lora_adapters(model, adapters, **options)
    assert state(model) == before
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("from_lora_adapters: ")


def test_adapters_of_another_base(tmp_path: Path) -> None:
    directories = saved(llama(), tmp_path)
    other = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "k_proj": nn.Linear(16, 16)})
    assert error_of(other, directories) == (
        f"model must have the layer 'model.layers.0.mlp.down_proj' of the LoRA in {tmp_path / 'english'}, "
        "got none that can be wrapped; nearest: 'q_proj', 'k_proj'"
    )
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    assert "the layer" in error_of(GPT2LMHeadModel(config), directories)
    wider = llama()
    wider.model.layers[1].mlp.down_proj = nn.Linear(32, 16).double()
    assert error_of(wider, directories) == (
        f"the LoRA of layer 'model.layers.1.mlp.down_proj' in {tmp_path / 'english'} must have the layer's in_features and "
        "out_features (32, 16), got (24, 16)"
    )


def test_a_layer_that_has_experts(tmp_path: Path) -> None:
    model = llama()
    apply_lmoe(model, ["q_proj"], num_experts=2, rank=2)
    assert error_of(model, saved(llama(), tmp_path)).endswith(f"'{Q}' already has experts")


def test_bases_of_different_names_are_one_warning(tmp_path: Path) -> None:
    directories = saved(llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        change_config(directories["english"], base_model_name_or_path="meta/tiny")
        from_lora_adapters(llama(), directories)
        change_config(directories["c"], base_model_name_or_path="meta/tiny")
        from_lora_adapters(llama(), directories)
    change_config(directories["c"], base_model_name_or_path="meta/small")
    with pytest.warns(UserWarning, match="from_lora_adapters") as caught:
        from_lora_adapters(llama(), directories)
    assert [str(w.message) for w in caught if "from_lora_adapters" in str(w.message)] == [
        "from_lora_adapters: the adapters were trained for base models of different names: 'english' for 'meta/tiny', "
        "'c' for 'meta/small'"
    ]


def test_names_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama()
    saved(plain, tmp_path / "x", {"a": LORAS["english"]})
    saved(plain, tmp_path / "y", {"a": LORAS["english"]})
    both = [tmp_path / "x" / "a", f"{tmp_path}/y/a/"]
    assert error_of(plain, both) == (
        "adapters must have different names, got two of the name 'a': pass a dict of names and directories"
    )
    assert error_of(plain, str(both[0])) == f"adapters must be a dict or a list of directories, got '{both[0]}'"
    assert error_of(plain, []) == "adapters must name at least one directory, got none"
    assert error_of(plain, {"a": 3}) == "adapters must hold paths of directories, got 3"
    assert error_of(plain, [None]) == "adapters must hold paths of directories, got None"
    assert "expert_names must be None or several str that are not empty" in error_of(plain, {"": both[0]})
    assert error_of(plain, {"a": tmp_path}) == f"{tmp_path / CONFIG} does not exist"
    assert "top_k must be in 1 .. E = 1, got 2" in error_of(plain, both[:1], top_k=2)
    assert "dtype must be one of" in error_of(plain, both[:1], dtype=torch.int8)
    monkeypatch.chdir(both[0])
    from_lora_adapters(plain, ["."])
    assert expert_names(plain) == ["a"]


def test_one_damaged_adapter_leaves_the_model_unchanged(tmp_path: Path) -> None:
    directories = saved(llama(), tmp_path)
    change_config(directories["c"], use_dora=True)
    assert error_of(llama(), directories).startswith(f"'use_dora' in {directories['c'] / CONFIG} must be empty")


def test_a_model_without_data_or_distributed(tmp_path: Path) -> None:
    directories = saved(llama(), tmp_path)
    assert "model must have data" in error_of(llama().to("meta"), directories)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = llama()
    assert "must get its L-MoE layers before it is distributed" in error_of(wrapped, directories)
