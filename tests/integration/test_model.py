"""Whole models: what apply_lmoe wraps and what it refuses."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lmoe_kernels import LMoELinear, apply_lmoe, lmoe, lmoe_layers
from tests.models import IDS, llama, state


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "v_proj"], 4),
        ("model.layers.1.self_attn.q_proj", 1),
        (r".*\.mlp\..*", 6),
        (["q_proj", r"model\.layers\.0\..*"], 8),
        ("all-linear", 14),
        ("lm_head", 1),
    ],
)
def test_targets(targets, count: int) -> None:
    model = llama()
    before = model(IDS).logits
    names = apply_lmoe(model, targets, num_experts=2, rank=2)
    assert len(names) == count
    assert list(lmoe_layers(model)) == names
    torch.testing.assert_close(model(IDS).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{p}" for name in names for p in ("lora_a", "lora_b", "gate_weight")}


def test_a_second_call_keeps_the_first_layers_trained() -> None:
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=2)
    apply_lmoe(model, "all-linear", num_experts=4, rank=1)
    assert {layer.num_experts for layer in lmoe_layers(model).values()} == {2, 4}
    assert all(layer.num_trainable_parameters for layer in lmoe_layers(model).values())
    assert not any(isinstance(layer.frozen_layer, LMoELinear) for layer in lmoe_layers(model).values())


def test_a_layer_under_two_names_stays_one() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    assert apply_lmoe(model, "all-linear", num_experts=2, rank=1) == ["a", "b.0"]
    assert model["a"] is model["b"][0]


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ("q_prj", "match linear layers of the model, got 'q_prj'; nearest: 'q_proj', "),
        (["q_proj", "nothing"], "match linear layers of the model, got 'nothing'; nearest: "),
        ([], "name at least one layer, got []"),
        ("(", "match linear layers of the model, got '('; nearest: "),
    ],
)
def test_a_target_that_matches_nothing_leaves_the_model_unchanged(targets, text: str) -> None:
    model = llama()
    before = state(model)
    with pytest.raises(ValueError) as caught:
        apply_lmoe(model, targets)
    assert str(caught.value).startswith(f"apply_lmoe: target_modules must {text}")
    assert state(model) == before
    with pytest.raises(ValueError, match="top_k"):
        apply_lmoe(model, "q_proj", top_k=99)
    assert state(model) == before


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("q_proj", "got 'q_proj'; 'model.layers.0.self_attn.q_proj' already has experts"),
        ("embed_tokens", "got 'embed_tokens'; 'model.embed_tokens' (Embedding) has no in_features and out_features"),
    ],
)
def test_the_error_says_why_a_target_cannot_be_wrapped(target: str, text: str) -> None:
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=2, rank=2)
    with pytest.raises(ValueError) as caught:
        apply_lmoe(model, target)
    assert str(caught.value) == f"apply_lmoe: target_modules must match linear layers of the model, {text}"


def test_gpt2s_convolutions_are_linear_layers() -> None:
    """transformers' Conv1D: a product with a weight of shape (I, O)."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).double().eval()
    before = model(IDS).logits
    names = apply_lmoe(model, "all-linear", num_experts=2, rank=2)
    assert names == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    layers = lmoe_layers(model)
    assert (layers[names[0]].in_features, layers[names[0]].out_features) == (16, 48)
    torch.testing.assert_close(model(IDS).logits, before)
    for layer in layers.values():
        nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 16, dtype=torch.float64)
    layer = layers[names[0]]
    delta = lmoe(x, layer.lora_a, layer.lora_b, gate_weight=layer.gate_weight, scaling=layer.scaling)
    torch.testing.assert_close(layer(x), layer.frozen_layer(x) + delta)


@pytest.mark.parametrize("target", [None, 5, ["q_proj", 1], b"q_proj"], ids=repr)
def test_a_target_must_be_a_name(target) -> None:
    with pytest.raises(TypeError) as caught:
        apply_lmoe(llama(), target)
    assert str(caught.value) == f"apply_lmoe: target_modules must be a str or several, got {target!r}"
    with pytest.raises(TypeError, match=r"apply_lmoe: model must be a torch.nn.Module, got str"):
        apply_lmoe("llama", "q_proj")  # pyright: ignore[reportArgumentType]


def test_a_model_that_reads_the_weight_of_its_layers() -> None:
    """T5 reads the dtype of the weight of its last linear layer."""
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double()
    before = model(input_ids=IDS, labels=IDS).loss
    names = apply_lmoe(model, "all-linear", num_experts=2, rank=2)
    assert any(name.endswith(".wo") for name in names)
    after = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(after, before)


def test_layers_that_are_never_called_are_not_wrapped() -> None:
    """Attention multiplies by out_proj.weight itself; without gradients an encoder layer does the same with its weights."""
    model = nn.Transformer(16, 2, 1, 1, 24, batch_first=True, dropout=0.0, dtype=torch.float64)
    assert apply_lmoe(model, "all-linear", num_experts=2, rank=2) == ["decoder.layers.0.linear1", "decoder.layers.0.linear2"]
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = model(x, x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, x), expected)
    for target, name in (("out_proj", "MultiheadAttention"), ("encoder.layers.0.linear1", "TransformerEncoderLayer")):
        with pytest.raises(ValueError, match=f"is not called: {name} uses its weight directly"):
            apply_lmoe(model, target)


def test_tied_weights_can_be_tied_again() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    apply_lmoe(model, "lm_head", num_experts=2, rank=2)
    model.tie_weights()
    assert model.lm_head.frozen_layer.weight is model.model.embed_tokens.weight
    assert set(dict(model.lm_head.named_parameters(recurse=False))) == {"lora_a", "lora_b", "gate_weight"}
