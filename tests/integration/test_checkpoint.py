"""Saving and loading experts and gates: round trips, damaged files, models that differ."""

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


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 5, "top_k": 2, "mixing": "outputs", "shared_a": True}, {"gate_bias": True}], ids=str
)
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


def _edit(change_config=lambda config: None, change_tensors=lambda tensors: None):
    """A change of both files that leaves them consistent, as if one save had written them."""

    def edit(folder: Path) -> None:
        config, tensors = json.loads((folder / "lmoe_config.json").read_text()), load_file(folder / "lmoe.safetensors")
        change_config(config)
        change_tensors(tensors)
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "lmoe_config.json").write_text(text)
        save_file(tensors, folder / "lmoe.safetensors", metadata={"format": "pt", "lmoe_config": text})

    return edit


def _edit_config(change):
    return _edit(change_config=change)


def _edit_tensors(change):
    return _edit(change_tensors=change)


Q = "model.layers.0.self_attn.q_proj"
DAMAGES = {
    "not JSON": (lambda f: (f / "lmoe_config.json").write_text("{"), ValueError, "must be JSON, got Expecting"),
    "another format": (
        _edit_config(lambda c: c.update(format="peft")),
        ValueError,
        "must have format 'lmoe_kernels', got 'peft'",
    ),
    "a later version": (_edit_config(lambda c: c.update(version=3)), ValueError, "must have version 1 or 2, got 3"),
    "no layers": (
        _edit_config(lambda c: c.update(layers=[])),
        ValueError,
        "must map the names of layers to their options, got []",
    ),
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
    "options of a layer that are not an object": (
        _edit_config(lambda c: c["layers"].update({Q: [1]})),
        ValueError,
        "must map the names of layers to their options, got {",
    ),
    "alpha beyond a float": (
        _edit_config(lambda c: c["layers"][Q].update(alpha=10**400)),
        ValueError,
        f"layer {Q!r}: alpha must be a finite number, got an integer beyond the range of a float",
    ),
    "no alpha": (
        _edit_config(lambda c: c["layers"][Q].update(alpha=None)),
        ValueError,
        f"layer {Q!r}: alpha must be a finite number, got NoneType",
    ),
    "too many experts": (
        _edit_config(lambda c: c["layers"][Q].update(num_experts=10**19)),
        ValueError,
        f"tensor '{Q}.lora_a' must have shape (10000000000000000000, 2, 16), got (3, 2, 16)",
    ),
    "a rank that is text": (
        _edit_config(lambda c: c["layers"][Q].update(rank="2")),
        ValueError,
        f"layer {Q!r}: rank must be an int, got str",
    ),
    "deep nesting": (
        lambda f: (f / "lmoe_config.json").write_text("[" * 100_000),
        ValueError,
        "lmoe_config.json must be JSON, got",
    ),
    "an integer of 5000 digits": (
        lambda f: (f / "lmoe_config.json").write_text('{"rank": ' + "9" * 5000 + "}"),
        ValueError,
        "lmoe_config.json must be JSON, got",
    ),
    "not UTF-8": (
        lambda f: (f / "lmoe_config.json").write_bytes(b'{"format": "\xff"}'),
        ValueError,
        "lmoe_config.json must be JSON, got",
    ),
    "another base": (
        _edit_config(lambda c: c.update(base="0" * 64)),
        ValueError,
        "model must have the linear layers of the one that was saved to",
    ),
    "options of another save": (
        lambda f: (f / "lmoe_config.json").write_text((f / "lmoe_config.json").read_text().replace("factors", "outputs")),
        ValueError,
        "lmoe_config.json must hold the configuration that lmoe.safetensors was saved with, got another: a save was",
    ),
    "version 1 without its options": (
        lambda f: [
            save_file(load_file(f / "lmoe.safetensors"), f / "lmoe.safetensors"),
            (f / "lmoe_config.json").unlink(),
        ],
        FileNotFoundError,
        "lmoe_config.json does not exist",
    ),
    "tensors of version 1 with options of version 2": (
        lambda f: save_file(load_file(f / "lmoe.safetensors"), f / "lmoe.safetensors"),
        ValueError,
        "lmoe.safetensors must hold the configuration that it was saved with, got none: save again",
    ),
    "an adapter of PEFT": (
        lambda f: [
            (f / "lmoe_config.json").unlink(),
            (f / "lmoe.safetensors").unlink(),
            (f / "adapter_config.json").write_text("{}"),
        ],
        ValueError,
        "directory must hold what save_lmoe wrote, got a PEFT adapter (peft.PeftModel.from_pretrained loads it)",
    ),
    "no tensors": (lambda f: (f / "lmoe.safetensors").unlink(), FileNotFoundError, "lmoe.safetensors does not exist"),
    "not safetensors": (
        lambda f: (f / "lmoe.safetensors").write_bytes(b"PK"),
        ValueError,
        "must be a safetensors file, got",
    ),
    "missing tensor": (
        _edit_tensors(lambda t: t.pop(f"{Q}.lora_a")),
        ValueError,
        f"lmoe.safetensors must hold '{Q}.lora_a', got none of that name",
    ),
    "foreign tensor": (_edit_tensors(lambda t: t.update(alien=torch.ones(1))), ValueError, "got 1 unknown: 'alien'"),
    "misshapen tensor": (
        _edit_tensors(lambda t: t.update({f"{Q}.lora_a": torch.ones(3, 2, 15)})),
        ValueError,
        f"tensor '{Q}.lora_a' must have shape (3, 2, 16), got (3, 2, 15)",
    ),
    "integer tensor": (
        _edit_tensors(lambda t: t.update({f"{Q}.lora_a": torch.ones(3, 2, 16, dtype=torch.int8)})),
        ValueError,
        f"tensor '{Q}.lora_a' must have one of the dtypes",
    ),
}


# a model with layers compares the options with those of its layers, before each of them is checked
OF_OTHER_OPTIONS = ("bad option", "alpha beyond a float", "no alpha", "too many experts", "a rank that is text")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("has_layers", [False, True], ids=["plain model", "model with layers"])
def test_a_bad_file_leaves_the_model_as_it_was(damage: str, has_layers: bool, tmp_path: Path) -> None:
    save_lmoe(with_experts(llama()), tmp_path)
    edit, error, text = DAMAGES[damage]
    edit(tmp_path)
    model = with_experts(llama()) if has_layers else llama()
    before, tensors = state(model), copy.deepcopy(model.state_dict())
    if has_layers and damage in OF_OTHER_OPTIONS:
        error, text = ValueError, f"layer {Q!r} must have the model's options"
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
    with pytest.raises(ValueError, match=r"must hold the model's L-MoE layer 'model.layers.0.self_attn.k_proj', got 4"):
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
    """Experts saved in fp32 stay in fp32 as master weights; others take the model's dtype."""
    source = with_experts(llama().to(saved), dtype=saved)
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


def test_loading_into_layers_keeps_the_rest_of_the_model_trained(tmp_path: Path) -> None:
    model = with_experts(llama())
    save_lmoe(model, tmp_path)
    model.lm_head.requires_grad_(True)
    load_lmoe(model, tmp_path)
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("has_layers", [False, True], ids=["plain model", "model with layers"])
def test_a_model_on_the_meta_device_is_refused(has_layers: bool, tmp_path: Path) -> None:
    """Copying numbers to the meta device does nothing and raises no error."""
    save_lmoe(with_experts(llama()), tmp_path)
    model = (with_experts(llama()) if has_layers else llama()).to("meta")
    before = state(model)
    with pytest.raises(ValueError) as caught:
        load_lmoe(model, tmp_path)
    must = "must have data (see torch.nn.Module.to_empty), got one on the meta device"
    assert str(caught.value) == f"load_lmoe: layer {Q!r} {must}"
    assert state(model) == before


def test_a_compiled_model_keeps_its_own_names(tmp_path: Path) -> None:
    model = with_experts(llama())
    save_lmoe(torch.compile(model), tmp_path)
    fresh = llama()
    assert load_lmoe(torch.compile(fresh), tmp_path) == list(lmoe_layers(model)) == list(lmoe_layers(fresh))


def test_several_threads_may_save_to_one_place(tmp_path: Path) -> None:
    """The processes of one training may do so."""
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
