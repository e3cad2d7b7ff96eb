"""What vLLM's layers hold of an adapter: modules of fused layers, parts of tensor-parallel ranks, names. Without vLLM."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmoe_kernels import StackedExperts, apply_lmoe, lmoe, lmoe_stacked_, save_lmoe
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.vllm import layouts
from lmoe_kernels.vllm.layouts import Cut, Member, ServedAdapter, ServedLayer
from tests.models import llama

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "fused": ["fused"]}


@pytest.mark.parametrize(
    ("prefix", "is_qkv", "expected"),
    [
        ("model.layers.3.self_attn.qkv_proj", True, [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")]),
        ("model.layers.3.mlp.gate_up_proj", False, [("gate_proj", 0), ("up_proj", 1)]),
        ("model.layers.3.mlp.down_proj", False, [("down_proj", None)]),
        ("model.layers.3.mlp.fused", True, [("fused", None)]),
    ],
)
def test_modules_of_a_layer(prefix: str, is_qkv: bool, expected: list) -> None:
    parent = prefix.rpartition(".")[0]
    assert layouts.modules_of(prefix, PACKED, is_qkv) == [(f"{parent}.{name}", shard) for name, shard in expected]
    assert layouts.modules_of("fused", PACKED, False) == [("fused", None)]


def _layer(in_features: int, out_features: int, gate: str = "q", **options) -> ServedLayer:
    config = LayerConfig(**{"num_experts": 3, "rank": 2, "alpha": 3.0, **options})
    return ServedLayer(config, in_features, out_features, gate)


def _tensors(layer: ServedLayer) -> dict[str, Tensor]:
    return {key: torch.randn(shape, dtype=torch.float64) for key, shape in layer.shapes.items()}


def _delta(x: Tensor, layer: ServedLayer, tensors: dict[str, Tensor]) -> Tensor:
    config = layer.config
    options = {"mixing": config.mixing, "top_k": config.top_k, "renormalize": config.renormalize}
    factors = {key: tensors.get(key) for key in ("gate_weight", "gate_bias")}
    return lmoe(x, tensors["lora_a"], tensors["lora_b"], **factors, scaling=config.alpha / config.rank, **options)


def _experts(members: list[Member], tensors: list[dict[str, Tensor]], cut: Cut) -> StackedExperts:
    experts = StackedExperts(layouts.blocks_of(members, cut), cut.rows, dtype=torch.float64, gate_bias=True)
    for index, (member, of_member) in enumerate(zip(members, tensors, strict=True)):
        for key, tensor in of_member.items():
            experts.fill(index, key, layouts.part_of(member, key, tensor, cut))
    return experts


@pytest.mark.parametrize(("ranks", "heads"), [(1, 2), (2, 2), (2, 1), (4, 2)])
def test_the_ranks_of_a_column_parallel_layer(ranks: int, heads: int) -> None:
    """q is cut by the rank; of k and v each rank has the heads that its q needs. k has no experts."""
    whole = [8 * 4, heads * 4, heads * 4]
    q, v = (
        _layer(12, whole[0], top_k=2, gate_bias=True),
        _layer(12, whole[2], num_experts=4, shared_a=True, mixing="outputs"),
    )
    adapter = ServedAdapter("one", "", "", {"q": q._replace(gate="q"), "v": v._replace(gate="v")})
    x, tensors, results = torch.randn(5, 12, dtype=torch.float64), [_tensors(q), _tensors(v)], []
    expected = _delta(x, q, tensors[0]), _delta(x, v, tensors[1])
    for rank in range(ranks):
        copies = max(1, ranks // heads)
        sizes = [whole[0] // ranks, whole[1] * copies // ranks, whole[2] * copies // ranks]
        cut = layouts.column_cut(12, whole, sizes, [rank, rank // copies, rank // copies])
        members = layouts.members_of([adapter], [("q", "q"), (None, "k"), ("v", "v")], "qkv", 3)
        y = lmoe_stacked_(torch.zeros(5, sum(sizes), dtype=torch.float64), x, _experts(members, tensors, cut))
        of_q, of_k, of_v = y.split(sizes, dim=1)
        assert not cut.cuts_inputs
        assert not of_k.any()
        torch.testing.assert_close(of_q, expected[0].chunk(ranks, dim=1)[rank])
        torch.testing.assert_close(of_v, expected[1].chunk(min(ranks, heads), dim=1)[rank // copies])
        results.append(of_q)
    torch.testing.assert_close(torch.cat(results, dim=1), expected[0])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_of_a_row_parallel_layer(ranks: int) -> None:
    layer = _layer(12, 10, gate="o", top_k=2, gate_bias=True)
    adapter, tensors = ServedAdapter("one", "", "", {"o": layer}), _tensors(layer)
    x = torch.randn(5, 12, dtype=torch.float64)
    members = layouts.members_of([adapter], [("o", None)], "o", 1)
    cuts = [layouts.row_cut(12, 12 // ranks, rank, [10]) for rank in range(ranks)]
    assert all(cut.cuts_inputs == (ranks > 1) for cut in cuts)
    experts = [_experts(members, [tensors], cut) for cut in cuts]
    logits = sum(x[:, cut.inputs] @ of_rank.gate_weight.T for cut, of_rank in zip(cuts, experts, strict=True))
    y = torch.zeros(5, 10, dtype=torch.float64)
    for cut, of_rank in zip(cuts, experts, strict=True):
        lmoe_stacked_(y, x[:, cut.inputs], of_rank, gate_logits=logits)
    torch.testing.assert_close(y, _delta(x, layer, tensors))


def test_a_module_that_is_fused_in_the_plain_model_too() -> None:
    """Its rank holds a part of each output, so its columns do not follow one another in the whole."""
    layer, x, ranks = _layer(6, 24, gate="fused"), torch.randn(3, 6, dtype=torch.float64), 2
    adapter, tensors = ServedAdapter("one", "", "", {"fused": layer}), _tensors(layer)
    members = layouts.members_of([adapter], [("fused", None)], "fused", 3)
    parts = []
    for rank in range(ranks):
        cut = layouts.column_cut(6, [16, 4, 4], [8, 2, 2], [rank] * 3)
        y = lmoe_stacked_(torch.zeros(3, 12, dtype=torch.float64), x, _experts(members, [tensors], cut))
        parts.append(y.split([8, 2, 2], dim=1))
    whole = torch.cat([torch.cat(outputs, dim=1) for outputs in zip(*parts, strict=True)], dim=1)
    torch.testing.assert_close(whole, _delta(x, layer, tensors))


def test_blocks_are_adapter_by_adapter() -> None:
    layers = {name: _layer(6, 4, gate=name) for name in ("q", "k", "v")}
    first, second = ServedAdapter("1", "", "", {"v": layers["v"], "q": layers["q"]}), ServedAdapter("2", "", "", layers)
    modules = [("q", "q"), ("k", "k"), ("v", "v")]
    members = layouts.members_of([first, second], modules, "qkv", 3)
    assert [(m.adapter, m.name) for m in members] == [(0, "q"), (0, "v"), (1, "q"), (1, "k"), (1, "v")]
    blocks = layouts.blocks_of(members, layouts.column_cut(6, [4, 4, 4], [2, 2, 2], [1, 1, 1]))
    assert [(b.group, b.column, b.out_features) for b in blocks] == [(0, 0, 2), (0, 4, 2), (1, 0, 2), (1, 2, 2), (1, 4, 2)]


REFUSED = {
    "fewer features": (
        lambda: layouts.blocks_of(
            layouts.members_of([ServedAdapter("a", "", "", {"q": _layer(8, 4)})], [("q", None)], "q", 1),
            layouts.column_cut(6, [4], [4], [0]),
        ),
        "lmoe: layer 'q' must have 8 features in and 4 out, as the base model of its adapter, got 6 and 4",
    ),
    "two modules for three outputs": (
        lambda: layouts.members_of([ServedAdapter("a", "", "", {"q": _layer(8, 4)})], [("q", 0), ("z", 1)], "model.qz", 3),
        "lmoe: layer 'model.qz' must have as many outputs as modules, got 3 for 2 modules",
    ),
    "a router in another layer of vLLM": (
        lambda: layouts.members_of([ServedAdapter("a", "", "", {"k": _layer(8, 4)})], [("k", None)], "k", 1),
        "lmoe: layer 'k' must be in one layer of vLLM with 'q', with which it shares a router, got it in 'k'",
    ),
    "a part of a tensor": (
        lambda: layouts.part_of(
            Member(0, "q", None, slice(0, 1), _layer(8, 4)), "lora_b", torch.zeros(3, 2, 2), layouts.row_cut(8, 8, 0, [4])
        ),
        "lmoe: tensor 'q.lora_b' must have shape (3, 2, 4), got (3, 2, 2)",
    ),
    "a module without experts": (
        lambda: layouts.addressed([Member(0, "q", "q", slice(0, 1), _layer(8, 4))], "lora_a", "k"),
        "lmoe: lora_a of the module 'k' must belong to one of 'q', got no experts there",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_names_in_a_stream_of_weights() -> None:
    layer = _layer(4, 4)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.w1"]
    pattern = layouts.stream_pattern([ServedAdapter("a", "", "", dict.fromkeys(names, layer))])

    def mapped(name: str) -> str:
        return pattern.sub(r"\1.lmoe.\2", name)

    for key in layouts.KEYS:
        expected = f"layers.0.self_attn.q_proj.lmoe.{key}"
        assert mapped(f"layers.0.self_attn.q_proj.{key}") == expected
        assert mapped(expected) == expected
        assert mapped(f"w1.{key}") == f"w1.lmoe.{key}"
    assert mapped("model.q_proj.router.gate_weight") == "model.q_proj.lmoe.gate_weight"
    for name in ("model.layers.0.k_proj.lora_a", "model.xq_proj.lora_a", "q_proj.weight", "q_proj.lora_a.weight", "lora_a"):
        assert mapped(name) == name


def test_a_shared_gate_in_a_stream_reaches_all_its_modules() -> None:
    members = [
        Member(adapter, name, shard, slice(i, i + 1), _layer(4, 4, gate=gate))
        for adapter in (0, 1)
        for i, (name, shard, gate) in enumerate([("q", "q", "q"), ("k", "k", "q"), ("v", "v", "v")])
    ]
    assert layouts.addressed(members, "gate_weight", "q") == [0, 1, 3, 4]
    assert layouts.addressed(members, "lora_a", "q") == [0, 3]
    assert layouts.addressed(members, "gate_bias", "v") == [2, 5]


def test_names_that_no_layer_has() -> None:
    layer, names = _layer(4, 4), [f"model.layers.{i}.q_proj" for i in range(4)]
    adapter = ServedAdapter("a", "", "", dict.fromkeys([*names, "head"], layer))
    assert layouts.unserved([adapter], [*names, "head"], None) is None
    random.shuffle(names)
    assert layouts.unserved([adapter], names, None) == "head"
    some = ["model.layers.2.q_proj", "model.layers.3.q_proj", "head"]
    assert layouts.unserved([adapter], some, None) == "model.layers.0.q_proj"
    assert layouts.unserved([adapter], some, range(2, 4)) is None  # the others are on another rank
    assert layouts.unserved([adapter], some, range(1, 4)) == "model.layers.1.q_proj"


def test_an_adapter_of_a_group_has_its_gate_in_each_layer(tmp_path: Path) -> None:
    model = llama().float()
    apply_lmoe(model, "all-linear", num_experts=3, rank=2, router="group", gate_bias=True)
    save_lmoe(model, tmp_path)
    adapter = layouts.served_adapter("default", str(tmp_path))
    tensors = layouts.tensors_to_serve(layouts.saved_layers("lmoe", tmp_path))
    state = model.state_dict()
    for name, layer in adapter.layers.items():
        parent, _, last = name.rpartition(".")
        holder = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last, last)
        assert layer.gate == f"{parent}.{holder}"
        assert tensors[name].keys() == layer.shapes.keys()
        for key in ("gate_weight", "gate_bias"):
            assert torch.equal(tensors[name][key], state[f"{layer.gate}.router.{key}"])
        assert torch.equal(tensors[name]["lora_a"], state[f"{name}.lora_a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modules_to_save": "lm_head"},
            "lmoe: an adapter must contain no other trained modules (modules_to_save), got 'lm_",
        ),
        ({"router": "block"}, "lmoe: layer 'model.layers.0.self_attn.q_proj' must have a router that reads the layer's own"),
        ({"router": "model"}, "lmoe: layer 'model.layers.0.self_attn.q_proj' must have a router that reads the layer's own"),
        ({"router_reads": "prefix"}, "got router='layer', router_reads='prefix'"),
    ],
    ids=str,
)
def test_adapters_that_vllm_cannot_serve(options: dict, message: str, tmp_path: Path) -> None:
    model = llama().float()
    apply_lmoe(model, "q_proj", num_experts=3, rank=2, **options)
    save_lmoe(model, tmp_path)
    with pytest.raises(ValueError) as error:
        layouts.served_adapter("default", str(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class _HFConfig:
    def __init__(self, **entries: object) -> None:
        vars(self).update(entries)


@pytest.mark.parametrize(
    "entries", [{}, {"lmoe_adapter": ""}, {"lmoe_adapter": 3}, {"lmoe_adapter": "/no/such/folder"}], ids=str
)
def test_overrides_without_a_directory(entries: dict) -> None:
    with pytest.raises(ValueError, match=r"^lmoe: [^\n]*--hf-overrides must [^\n]*, got [^\n]*$"):
        layouts.adapter_directories(_HFConfig(**entries))


def test_overrides_with_a_directory(tmp_path: Path) -> None:
    assert layouts.adapter_directories(_HFConfig(lmoe_adapter=str(tmp_path))) == {"default": str(tmp_path)}
