"""Saving and loading experts and gates: round trips, files that are not what they should be, models that differ."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from lmoe_kernels import LMoELinear, apply_lmoe, collect_router_logits, lmoe_layers, load_lmoe, save_lmoe
from tests.models import IDS, llama, state, with_experts


@pytest.mark.parametrize("options", [{}, {"alpha": 5, "top_k": 2, "mixing": "outputs", "shared_a": True}], ids=str)
def test_save_and_load(options: dict, tmp_path: Path) -> None:
    base = llama()
    model = with_experts(copy.deepcopy(base), **options)
    expected = model(IDS).logits
    save_lmoe(model, tmp_path / "new" / "folder")
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == ["lmoe.safetensors", "lmoe_config.json"]
    fresh = copy.deepcopy(base)
    assert load_lmoe(fresh, tmp_path / "new" / "folder", output_router_logits=True) == list(lmoe_layers(model))
    assert torch.equal(fresh(IDS).logits, expected)
    assert collect_router_logits(fresh)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    changed = with_experts(copy.deepcopy(base), **options)
    load_lmoe(changed, tmp_path / "new" / "folder")
    assert torch.equal(changed(IDS).logits, expected)


def _edit_config(change):
    def edit(folder: Path) -> None:
        path = folder / "lmoe_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def _edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "lmoe.safetensors")
        change(tensors)
        save_file(tensors, folder / "lmoe.safetensors")

    return edit


Q = "model.layers.0.self_attn.q_proj"
DAMAGES = {
    "not JSON": (lambda f: (f / "lmoe_config.json").write_text("{"), ValueError, "must be JSON, got Expecting"),
    "another format": (
        _edit_config(lambda c: c.update(format="peft")),
        ValueError,
        "must say format 'lmoe_kernels', got 'peft'",
    ),
    "a later version": (_edit_config(lambda c: c.update(version=2)), ValueError, "must be of version 1, got 2"),
    "no layers": (_edit_config(lambda c: c.update(layers=[])), ValueError, "must map layers to their options, got []"),
    "unknown layer": (
        _edit_config(lambda c: c["layers"].update(foo=c["layers"][Q])),
        ValueError,
        "layer 'foo' must be a linear layer of the model, got none of that name",
    ),
    "unknown option": (
        _edit_config(lambda c: c["layers"][Q].update(dropout=1)),
        ValueError,
        f"layer {Q!r} must have the options",
    ),
    "bad option": (_edit_config(lambda c: c["layers"][Q].update(top_k=7)), ValueError, "top_k must be in 1 .. E = 3, got 7"),
    "no config": (lambda f: (f / "lmoe_config.json").unlink(), FileNotFoundError, "lmoe_config.json"),
    "no tensors": (lambda f: (f / "lmoe.safetensors").unlink(), FileNotFoundError, "lmoe.safetensors does not exist"),
    "not safetensors": (
        lambda f: (f / "lmoe.safetensors").write_bytes(b"PK"),
        ValueError,
        "must be a safetensors file, got",
    ),
    "missing tensor": (_edit_tensors(lambda t: t.pop(f"{Q}.lora_a")), ValueError, f"got 1 missing: '{Q}.lora_a'"),
    "foreign tensor": (_edit_tensors(lambda t: t.update(alien=torch.ones(1))), ValueError, "got 1 foreign: 'alien'"),
    "misshapen tensor": (
        _edit_tensors(lambda t: t.update({f"{Q}.lora_a": torch.ones(3, 2, 15)})),
        ValueError,
        f"tensor '{Q}.lora_a' must have shape (3, 2, 16), got (3, 2, 15)",
    ),
    "integer tensor": (
        _edit_tensors(lambda t: t.update({f"{Q}.lora_a": torch.ones(3, 2, 16, dtype=torch.int8)})),
        ValueError,
        f"tensor '{Q}.lora_a' must have a dtype of",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("has_layers", [False, True], ids=["plain model", "model with layers"])
def test_a_bad_file_leaves_the_model_as_it_was(damage: str, has_layers: bool, tmp_path: Path) -> None:
    save_lmoe(with_experts(llama()), tmp_path)
    edit, error, text = DAMAGES[damage]
    edit(tmp_path)
    model = with_experts(llama()) if has_layers else llama()
    before, tensors = state(model), copy.deepcopy(model.state_dict())
    if has_layers and damage == "bad option":
        text = "must have the model's options"
    elif has_layers and damage == "unknown option":
        text = f"layer {Q!r} must have the model's options"
    with pytest.raises(error) as caught:
        load_lmoe(model, tmp_path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state(model) == before
    assert all(torch.equal(t, tensors[name]) for name, t in model.state_dict().items())


def test_a_model_with_other_layers_is_refused(tmp_path: Path) -> None:
    save_lmoe(with_experts(llama()), tmp_path)
    model = llama()
    apply_lmoe(model, "k_proj", num_experts=3, rank=2)
    with pytest.raises(ValueError, match=r"must name the model's L-MoE layer 'model.layers.0.self_attn.k_proj'"):
        load_lmoe(model, tmp_path)


def test_saving_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_lmoe: model must have L-MoE layers"):
        save_lmoe(llama(), tmp_path)


def test_a_failed_save_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_experts(llama())
    save_lmoe(model, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    nn.init.normal_(lmoe_layers(model)[Q].lora_b)
    with pytest.raises(OSError, match="no space left"):
        save_lmoe(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_dtype(saved: torch.dtype, loaded: torch.dtype, tmp_path: Path) -> None:
    """The layers run there: experts in fp32 stay master weights, others take the model's dtype."""
    source = with_experts(llama().to(saved))
    save_lmoe(source, tmp_path)
    model = llama().to(loaded)
    load_lmoe(model, tmp_path)
    assert model(IDS).logits.dtype == loaded
    layer, original = lmoe_layers(model)[Q], lmoe_layers(source)[Q]
    assert layer.lora_b.dtype == (torch.float32 if saved == torch.float32 else loaded)
    assert torch.equal(layer.lora_b, original.lora_b.to(layer.lora_b.dtype))


def test_a_layer_under_two_names_is_loaded_under_both(tmp_path: Path) -> None:
    linear = nn.Linear(4, 4)
    plain = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    model = copy.deepcopy(plain)
    apply_lmoe(model, "all-linear", num_experts=2, rank=1)
    save_lmoe(model, tmp_path)
    load_lmoe(plain, tmp_path)
    assert isinstance(plain["a"], LMoELinear)
    assert plain["a"] is plain["b"][0]


def test_what_the_user_trains_beside_stays_trained_where_layers_are_filled(tmp_path: Path) -> None:
    model = with_experts(llama())
    save_lmoe(model, tmp_path)
    model.lm_head.requires_grad_(True)
    load_lmoe(model, tmp_path)
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("has_layers", [False, True], ids=["plain model", "model with layers"])
def test_a_model_on_the_meta_device_is_refused(has_layers: bool, tmp_path: Path) -> None:
    """Nothing can be copied there, and nothing would complain."""
    save_lmoe(with_experts(llama()), tmp_path)
    model = (with_experts(llama()) if has_layers else llama()).to("meta")
    before = state(model)
    with pytest.raises(ValueError) as caught:
        load_lmoe(model, tmp_path)
    must = "must hold numbers (see torch.nn.Module.to_empty), got one on the meta device"
    assert str(caught.value) == f"load_lmoe: layer {Q!r} {must}"
    assert state(model) == before


def test_a_compiled_model_keeps_its_own_names(tmp_path: Path) -> None:
    model = with_experts(llama())
    save_lmoe(torch.compile(model), tmp_path)
    fresh = llama()
    assert load_lmoe(torch.compile(fresh), tmp_path) == list(lmoe_layers(model)) == list(lmoe_layers(fresh))


def test_several_may_save_to_one_place(tmp_path: Path) -> None:
    """As the processes of one training do."""
    model = with_experts(llama())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: save_lmoe(model, tmp_path), range(40)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lmoe.safetensors", "lmoe_config.json"]
    load_lmoe(llama(), tmp_path)


@pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed package")
def test_sharded_and_data_parallel_models(tmp_path: Path) -> None:
    """FSDP2's parameters are DTensors; DistributedDataParallel puts a module around the model."""
    from torch.distributed.fsdp import fully_shard

    model = with_experts(llama())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        save_lmoe(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), tmp_path / "ddp")
        sharded = copy.deepcopy(model)
        for layer in lmoe_layers(sharded).values():
            layer.reset_parameters()
        fully_shard(sharded)
        assert load_lmoe(sharded, tmp_path / "ddp") == list(lmoe_layers(model))
        save_lmoe(sharded, tmp_path / "fsdp")
        torch.testing.assert_close(sharded(IDS).logits, model(IDS).logits)
        sharded(IDS).logits.sum().backward()
        assert all(p.grad is not None for p in sharded.parameters() if p.requires_grad)
    finally:
        distributed.destroy_process_group()
    files = [load_file(tmp_path / kind / "lmoe.safetensors") for kind in ("ddp", "fsdp")]
    assert all(torch.equal(a, b) for a, b in zip(files[0].values(), files[1].values(), strict=True))
    assert torch.equal(files[0][f"{Q}.lora_b"], lmoe_layers(model)[Q].lora_b)
