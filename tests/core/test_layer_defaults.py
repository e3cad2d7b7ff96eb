"""The defaults of alpha and gate_init_std; checkpoints keep the values that they were written with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmoe_kernels import LMoELinear, apply_lmoe, save_lmoe
from lmoe_kernels.adapter import read_adapter
from tests.models import llama, with_experts

MIXINGS = ("factors", "outputs")


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(
    "num_experts, rank, top_k, scaling", [(1, 7, None, 2), (8, 4, None, 16), (3, 16, None, 6), (8, 4, 2, 4)]
)
def test_the_scaling_is_twice_the_number_of_experts_that_share_a_token(
    num_experts: int, rank: int, top_k: int | None, scaling: float, mixing: str
) -> None:
    layer = LMoELinear(6, 5, num_experts=num_experts, rank=rank, top_k=top_k, mixing=mixing)
    assert layer.scaling == scaling
    assert layer.alpha == layer.config()["alpha"] == scaling * rank


def test_gates_that_are_not_renormalised_are_as_small_as_without_top_k() -> None:
    assert LMoELinear(6, 5, num_experts=8, rank=4, top_k=2, renormalize=False).scaling == 16


@pytest.mark.parametrize("alpha", [0, -3.5, 16])
def test_a_given_alpha_is_used(alpha: float) -> None:
    layer = LMoELinear(6, 5, num_experts=8, rank=4, alpha=alpha)
    assert (layer.alpha, layer.scaling) == (alpha, alpha / 4)


@pytest.mark.parametrize("options", [{"top_k": "2"}, {"top_k": 9}, {"mixing": "mean"}])
def test_bad_options_are_refused_if_alpha_is_not_given(options: dict) -> None:
    with pytest.raises((TypeError, ValueError), match=f"LMoELinear: {next(iter(options))} must be"):
        LMoELinear(6, 5, num_experts=8, rank=4, **options)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_equal_experts_are_one_lora_with_the_layers_scaling(mixing: str) -> None:
    layer = LMoELinear(6, 5, num_experts=8, rank=4, mixing=mixing, gate_init_std=0.0, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_b.normal_()
        layer.lora_a.copy_(layer.lora_a[:1].clone().expand_as(layer.lora_a))
        layer.lora_b.copy_(layer.lora_b[:1].clone().expand_as(layer.lora_b))
    x = torch.randn(3, 6, dtype=torch.float64)
    one_lora = x @ layer.lora_a[0].t() @ layer.lora_b[0]
    torch.testing.assert_close(layer(x) - layer.frozen_layer(x), 16 * one_lora)


@pytest.mark.parametrize("in_features", [64, 4096])
def test_router_logits_of_a_new_layer_do_not_depend_on_the_width(in_features: int) -> None:
    layer = LMoELinear(in_features, 8, num_experts=64, rank=1)
    assert layer.gate_weight.std().item() == pytest.approx(in_features**-0.5, rel=0.05)
    logits = torch.randn(200, in_features) @ layer.gate_weight.t()
    assert logits.std().item() == pytest.approx(1.0, rel=0.1)


def test_a_file_holds_its_alpha(tmp_path: Path) -> None:
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=3, rank=2)
    save_lmoe(model, tmp_path)
    options = next(iter(json.loads((tmp_path / "lmoe_config.json").read_text())["layers"].values()))
    assert options["alpha"] == 12


def test_a_file_of_version_1_without_alpha_keeps_a_scaling_of_one(tmp_path: Path) -> None:
    save_lmoe(with_experts(llama()), tmp_path)
    config = json.loads((tmp_path / "lmoe_config.json").read_text())
    layers = {name: {**options, "alpha": None} for name, options in config["layers"].items()}
    for options in layers.values():
        options.pop("renormalize", None)  # version 1 had no such option
    (tmp_path / "lmoe_config.json").write_text(json.dumps({"format": config["format"], "version": 1, "layers": layers}))
    save_file(load_file(tmp_path / "lmoe.safetensors"), tmp_path / "lmoe.safetensors")  # without the metadata of version 2

    read = read_adapter("load_lmoe", tmp_path).layers
    assert len(read) == 4
    for options in read.values():
        assert options["alpha"] / options["rank"] == 1
