"""What shared routers refuse, each with one line, and before anything is changed."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from lmoe_kernels import LMoELinear, apply_lmoe, lmoe_layers
from tests.integration.test_routers import Model, routed, routers
from tests.models import IDS, llama


def error_of(act: Any) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_layer_before_its_block() -> None:
    model = routed("block", "token")
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 12, 16).double()
    text = "LMoELinear: router must have read the input of its block before the layer runs, got none"
    assert error_of(lambda: layer(x)).startswith(text)
    with torch.no_grad():
        assert error_of(lambda: layer(x)) == text
    model(IDS)
    assert error_of(lambda: layer(x)).startswith(text)  # also after a forward, whose tokens were others
    model = routed("model", "token")
    model(IDS)
    assert "its first block before the layer runs" in error_of(lambda: model.model.layers[1].self_attn.q_proj(x))


def test_a_layer_after_a_block_that_was_called_alone() -> None:
    model, x = Model(), torch.randn(2, 3, 6)
    apply_lmoe(model, "all-linear", num_experts=2, rank=1, router="block")
    model.blocks[0](x).sum().backward()
    assert "before the layer runs, got none" in error_of(lambda: model.blocks[0].q_proj(torch.randn_like(x)))


def test_other_tokens_than_those_of_the_block() -> None:
    model = routed("block", "token")
    router = routers(model)[0]
    router.router_logits = torch.zeros(2, 5, 3)
    text = "LMoELinear: router must have read the tokens that the layer gets, got tokens (2, 5) for an input (2, 12, 16)"
    assert error_of(lambda: model.model.layers[0].self_attn.q_proj(torch.randn(2, 12, 16).double())) == text


def test_other_features_within_a_group() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(5, 4), "v_proj": nn.Linear(4, 4)})
    text = "apply_lmoe: k_proj must have in_features=4 like 'q_proj', with which it shares a router, got 5"
    assert error_of(lambda: apply_lmoe(model, "all-linear", num_experts=2, rank=1, router="group")) == text
    assert not lmoe_layers(model)
    assert model["q_proj"].weight.requires_grad


@pytest.mark.parametrize("options", [{"router": "block"}, {"router": "model"}, {"router_reads": "prefix"}], ids=str)
def test_a_layer_outside_of_the_blocks(options: dict) -> None:
    model = llama()
    text = error_of(lambda: apply_lmoe(model, "lm_head", num_experts=2, rank=1, **options))
    assert text.startswith("apply_lmoe: lm_head must be in a list of blocks (nn.ModuleList) where router=")
    assert not lmoe_layers(model)


def test_a_layer_alone() -> None:
    layer = LMoELinear(4, 4, num_experts=2, rank=1, router="block")
    text = "LMoELinear: router must be connected where it is 'block' (see apply_lmoe), got none"
    assert error_of(lambda: layer(torch.randn(2, 4))) == text


def test_a_mean_needs_sequences() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    apply_lmoe(model, "q", num_experts=2, rank=1, router_reads="prefix")
    assert error_of(lambda: model["q"](torch.randn(2, 4))).startswith(
        "Router: x must have shape (B, S, H) where router_read"
    )


def test_an_input_of_other_features() -> None:
    model = routed("block", "token")
    text = "Router: x must have 16 features, as many as the input of its block, got (2, 3, 8)"
    assert error_of(lambda: routers(model)[0](torch.randn(2, 3, 8))) == text


def test_a_block_without_its_input() -> None:
    model = routed("block", "token")
    text = "Router: block must get its input as the first argument or as hidden_states, got the keywords ['x']"
    assert error_of(lambda: model.model.layers[0](x=1)) == text


def test_logits_follow_the_layer_to_its_device() -> None:
    """A model may be spread over devices, the router of the model with its first block."""
    router = routers(routed("block", "token"))[0]
    router.router_logits = torch.zeros(2, 5, 3, requires_grad=True)
    assert router.logits_for(torch.empty(2, 5, 16, device="meta"), 4).is_meta


@pytest.mark.parametrize("options", [{"router": "block"}, {"router": "model"}, {"router_reads": "prefix"}], ids=str)
def test_cross_attention_reads_other_tokens(options: dict) -> None:
    """Its keys and values are computed from the encoder's tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    text = error_of(lambda: apply_lmoe(model, ["k", "v"], num_experts=2, rank=1, **options))
    assert text.endswith("got keys or values of cross-attention")
    targets = [r".*SelfAttention\.[qkv]", r".*EncDecAttention\.q", "wi"]
    apply_lmoe(model, targets, num_experts=2, rank=1, **options)
    assert len(routers(model)) == {"block": 4, "model": 2}.get(options.get("router", ""), 18)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(router.gate_weight.grad is not None for router in routers(model))


def test_keys_and_values_of_cross_attention_are_a_group() -> None:
    attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    model = nn.ModuleDict({"cross_attention": attention})
    apply_lmoe(model, "all-linear", num_experts=2, rank=1, router="group")
    assert attention["v_proj"].shared_router() is attention["k_proj"].shared_router()
    assert attention["q_proj"].shared_router() is not attention["k_proj"].shared_router()


def test_experts_of_the_model_get_only_some_tokens() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(4, 4), "w3": nn.Linear(4, 4)})])})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    text = error_of(lambda: apply_lmoe(model, "all-linear", num_experts=2, rank=1, router="block"))
    assert "must get all tokens of its block" in text
    apply_lmoe(model, "all-linear", num_experts=2, rank=1, router="group")
    assert len(routers(model)) == 1


def test_continuous_batching_refuses_prefixes() -> None:
    """Its rows are parts of several sequences, whose means would be those of other tokens."""
    continuous = pytest.importorskip("transformers.generation", reason="no continuous batching").ContinuousBatchingConfig
    model = llama().eval()
    apply_lmoe(model, "q_proj", num_experts=2, rank=1, router_reads="prefix")
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=2, pad_token_id=0)
    pages = continuous(num_blocks=16, max_batch_tokens=64)
    results = model.generate_batch([[5, 6, 7]], generation_config=config, continuous_batching_config=pages)
    message = "Router: router_reads must be 'token' in continuous batching, got 'prefix'"
    assert [result.error for result in results.values()] == [message]
