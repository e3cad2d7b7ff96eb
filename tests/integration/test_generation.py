"""Routers in a generation: steps with a cache give what one forward gives, under padding, packing and beams."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from lmoe_kernels import apply_lmoe, collect_router_logits, lmoe_layers

ROUTERS = [(scope, reads) for scope in ("layer", "group", "block", "model") for reads in ("token", "prefix")]
PREFIX = [router for router in ROUTERS if router[1] == "prefix"]
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}  # float64
ROTATED: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}  # transformers rotates by angles in float32


def with_routers(model: nn.Module, router: tuple[str, str], targets: Any = TARGETS, **options: Any) -> Any:
    scope, reads = router
    apply_lmoe(
        model.double().eval(), targets, num_experts=3, rank=2, gate_init_std=1.0, router=scope, router_reads=reads, **options
    )
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.3)
    return model


def llama(router: tuple[str, str], **options: Any) -> Any:
    config = LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return with_routers(LlamaForCausalLM(config), router, **options)


def ids(*shape: int) -> Tensor:
    return torch.randint(2, 32, shape)


def in_parts(model: Any, tokens: Tensor, sizes: list[int], **keywords: Any) -> Tensor:
    """The logits of a forward for each part, with one cache."""
    cache, done, logits = keywords.pop("cache", DynamicCache(config=model.config)), 0, []
    mask = keywords.pop("attention_mask", None)
    for size in sizes:
        if mask is not None:
            keywords["attention_mask"] = mask[:, : done + size]
        part = tokens[:, done : done + size]
        logits.append(model(part, past_key_values=cache, use_cache=True, **keywords).logits)
        done += size
    return torch.cat(logits, dim=1)


def padded_left(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Documents as rows of one batch, with pads of any ids before them, and the mask."""
    longest = max(map(len, documents))
    tokens = torch.stack([torch.cat([ids(longest - len(d)), d]) for d in documents])
    mask = torch.stack([(torch.arange(longest) >= longest - len(d)).long() for d in documents])
    return tokens, mask


@pytest.mark.parametrize("sizes", [[1] * 11, [5, 1, 1, 4], [3, 8], [10, 1]], ids=str)
@pytest.mark.parametrize("router", ROUTERS, ids="-".join)
@torch.no_grad()
def test_steps_with_a_cache_equal_one_forward(router: tuple[str, str], sizes: list[int]) -> None:
    model, tokens = llama(router), ids(3, 11)
    torch.testing.assert_close(in_parts(model, tokens, sizes), model(tokens, use_cache=False).logits, **EXACT)


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@torch.no_grad()
def test_a_prefix_router_reads_the_tokens_before(router: tuple[str, str]) -> None:
    """Else the tests of this file could not fail."""
    model, tokens = llama(router, output_router_logits=True), ids(1, 6)
    of_both = []
    for first in (3, 4):
        tokens[0, 0] = first
        model(tokens)
        of_both.append(collect_router_logits(model)["model.layers.0.self_attn.q_proj"][0, 1:])
    assert ((of_both[0] - of_both[1]).abs().amax(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@torch.no_grad()
def test_left_padding(router: tuple[str, str]) -> None:
    model, documents = llama(router), [ids(4), ids(9), ids(7)]
    tokens, mask = padded_left(documents)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    exact = model(tokens, attention_mask=mask, position_ids=positions).logits
    with_mask_alone = model(tokens, attention_mask=mask).logits
    in_steps = in_parts(model, tokens, [6, 1, 2], attention_mask=mask)
    for row, document in enumerate(documents):
        alone = model(document[None]).logits[0]
        torch.testing.assert_close(exact[row, -len(document) :], alone, **EXACT)
        torch.testing.assert_close(with_mask_alone[row, -len(document) :], alone, **ROTATED)
        torch.testing.assert_close(in_steps[row, -len(document) :], alone, **ROTATED)


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@torch.no_grad()
def test_right_padding(router: tuple[str, str]) -> None:
    model, tokens, lengths = llama(router), ids(2, 9), [5, 9]
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    logits = model(tokens, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row, :length], model(tokens[row : row + 1, :length]).logits[0], **EXACT)


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@torch.no_grad()
def test_packed_documents(router: tuple[str, str]) -> None:
    """Each row holds several documents; transformers keeps their attention apart where position_ids restart."""
    model, lengths = llama(router), [4, 1, 7, 3]
    documents = [ids(1, length) for length in lengths]
    tokens = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    for of_document, document in zip(logits.split(lengths, dim=1), documents, strict=True):
        torch.testing.assert_close(of_document, model(document).logits, **EXACT)


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_generate_with_a_cache_equals_generate_without(router: tuple[str, str], options: dict[str, Any]) -> None:
    model = llama(router)
    tokens, mask = padded_left([ids(4), ids(7)])
    fixed = {"attention_mask": mask, "max_new_tokens": 8, "output_scores": True, "return_dict_in_generate": True}
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    with_cache = model.generate(tokens, **fixed, **options)
    torch.manual_seed(seed)
    options = {key: value for key, value in options.items() if key not in ("cache_implementation", "prefill_chunk_size")}
    without = model.generate(tokens, use_cache=False, **fixed, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    for one, other in zip(with_cache.scores, without.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@torch.no_grad()
def test_a_static_cache_is_used_again_after_a_reset(router: tuple[str, str]) -> None:
    model = llama(router)
    options: dict[str, Any] = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False}
    for _ in range(2):
        tokens = ids(2, 5)
        with_cache = model.generate(tokens, **options)
        assert torch.equal(with_cache, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@torch.no_grad()
def test_copies_of_the_cache_of_a_prompt(router: tuple[str, str]) -> None:
    model, prompt = llama(router), ids(2, 5)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache, use_cache=True)
    for length in (1, 4):
        rest, of_copy = ids(2, length), copy.deepcopy(cache)
        assert isinstance(of_copy, DynamicCache)
        logits = model(rest, past_key_values=of_copy, use_cache=True).logits
        whole = model(torch.cat([prompt, rest], dim=1), use_cache=False).logits
        torch.testing.assert_close(logits, whole[:, -length:], **EXACT)
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_a_cache_keeps_its_sums_in_memory_of_their_own() -> None:
    """A step writes to the memory of the one before. That of a compiled graph's results is used again, and views of the
    sums of a long prompt would keep all of them alive.
    """
    model = llama(("block", "prefix"))
    cache, addresses = DynamicCache(config=model.config), []
    for length in (5, 1, 1):
        model(ids(2, length), past_key_values=cache, use_cache=True)
        kept = [t for sums in vars(cache)["_lmoe_sums"].values() for t in (sums.rows, sums.tokens)]
        assert all(t._base is None for t in kept)
        addresses.append([t.data_ptr() for t in kept])
    assert addresses[0] == addresses[1] == addresses[2]


@torch.no_grad()
def test_two_models_and_two_caches_in_turns() -> None:
    model, tokens = llama(("block", "prefix")), ids(2, 2, 6)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    logits = [[], []]
    for step in range(6):
        for one, cache in enumerate(caches):
            part = tokens[one, :, step : step + 1]
            logits[one].append(model(part, past_key_values=cache, use_cache=True).logits)
    for one in range(2):
        torch.testing.assert_close(torch.cat(logits[one], dim=1), model(tokens[one]).logits, **EXACT)


@torch.no_grad()
def test_caches_that_the_router_has_not_read_are_refused() -> None:
    model, tokens = llama(("block", "prefix")), ids(2, 6)
    must = "Router: router_reads='prefix' must have read all tokens in the cache"
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True)
    cache.crop(-2)
    with pytest.raises(ValueError, match=rf"^{must}, got a cache of 4 tokens, of which it has read 6 \(.*\)$"):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)
    of_another = DynamicCache(config=model.config)
    llama(("layer", "token"))(tokens, past_key_values=of_another, use_cache=True)
    with pytest.raises(ValueError, match=rf"^{must}, got a cache of 6 tokens, of which it has read 0 \(.*\)$"):
        model(tokens[:, :1], past_key_values=of_another, use_cache=True)
    with pytest.raises(ValueError, match=must):
        model.generate(tokens[:1], assistant_model=llama(("layer", "token")), max_new_tokens=12, do_sample=False)
    with pytest.raises(ValueError, match=must):
        model.generate(ids(1, 3).repeat(1, 4), prompt_lookup_num_tokens=4, max_new_tokens=12, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"^Router: x must have as many rows as the cache has sequences, 2, got 3$"):
        model(ids(3, 1), past_key_values=cache, use_cache=True)
    model(tokens, use_cache=True)  # an error leaves nothing behind


@pytest.mark.parametrize("router", [("group", "prefix"), ("block", "prefix")], ids="-".join)
@torch.no_grad()
def test_compiled_steps_with_a_cache(router: tuple[str, str]) -> None:
    """The graph breaks where the sums are kept, so fullgraph=True is an error of torch."""
    model, tokens = llama(router), ids(2, 8)
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, **EXACT)
    cache = DynamicCache(config=model.config)
    if router[0] == "group":  # its layers read one after another there
        with pytest.raises(ValueError, match=r"of which it has read 5 \(.* or router='group' under torch.compile\)$"):
            in_parts(compiled, tokens, [5], cache=cache)
        return
    torch.testing.assert_close(in_parts(compiled, tokens, [5, 1, 1, 1], cache=cache), expected, **EXACT)


@pytest.mark.parametrize("router", PREFIX, ids="-".join)
@torch.no_grad()
def test_sliding_windows(router: tuple[str, str]) -> None:
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4, pad_token_id=0, eos_token_id=None)
    model, tokens = with_routers(MistralForCausalLM(config), router), ids(2, 11)
    whole = model(tokens, use_cache=False).logits
    for sizes in ([1] * 11, [6, 1, 1, 3]):
        torch.testing.assert_close(in_parts(model, tokens, sizes), whole, **EXACT)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("router", [("layer", "prefix"), ("block", "prefix"), ("model", "prefix")], ids="-".join)
@torch.no_grad()
def test_models_that_pass_no_positions_to_their_blocks(router: tuple[str, str]) -> None:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=None)
    model = with_routers(GPT2LMHeadModel(config), router, ["c_attn", "mlp.c_proj"])
    tokens = ids(2, 9)
    whole = model(tokens, use_cache=False).logits
    for sizes in ([1] * 9, [4, 1, 4]):
        torch.testing.assert_close(in_parts(model, tokens, sizes), whole, **EXACT)
    padded, mask = padded_left([tokens[0], tokens[1, :5]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0], whole[0], **EXACT)
    torch.testing.assert_close(logits[1, -5:], whole[1, :5], **EXACT)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3}
    assert torch.equal(model.generate(padded, **options), model.generate(padded, use_cache=False, **options))


@pytest.mark.parametrize("router", [("layer", "prefix"), ("block", "prefix")], ids="-".join)
@torch.no_grad()
def test_encoders_and_decoders(router: tuple[str, str]) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = with_routers(T5ForConditionalGeneration(config), router, ["SelfAttention.q", "SelfAttention.v", "wo"])
    tokens, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6}
    for beams in (1, 3):
        with_cache = model.generate(tokens, num_beams=beams, **options)
        assert torch.equal(with_cache, model.generate(tokens, num_beams=beams, use_cache=False, **options))
    start = ids(2, 5)
    whole = model(tokens, attention_mask=mask, decoder_input_ids=start, use_cache=False).logits
    alone = model(tokens[1:, :4], decoder_input_ids=start[1:], use_cache=False).logits
    torch.testing.assert_close(whole[1:], alone, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("router", PREFIX, ids="-".join)
def test_recomputed_blocks_know_the_padding_and_the_positions(router: tuple[str, str], reentrant: bool) -> None:
    model = llama(router).train()
    model.enable_input_require_grads()
    tokens, mask = padded_left([ids(4), ids(9), ids(7)])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        (model(tokens, attention_mask=mask, use_cache=False).logits[:, -4:] ** 2).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and router[0] in ("block", "model"):
        must = "LMoELinear: router must be used with use_reentrant=False where activations are checkpointed"
        with pytest.raises(ValueError, match=must):
            gradients()
        return
    recomputed = gradients()
    assert expected.keys() == recomputed.keys()
    assert any("gate_weight" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(recomputed[name], gradient, **EXACT)


@pytest.mark.parametrize("scope", ["layer", "block"])
@torch.no_grad()
def test_long_packed_rows_in_float32_lose_no_digits(scope: str) -> None:
    """The mean of a late document is as exact as that of a row of its own."""
    model = llama((scope, "prefix"))
    router = lmoe_layers(model)["model.layers.0.self_attn.q_proj"].router
    lengths = [4000, 3, 50]
    rows = torch.cat([torch.randn(1, 4000, 16) * 100 + 1000, torch.randn(1, 53, 16)], dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    router.sequences.positions = positions
    means = router.sequences.running_means(rows, "")
    truth = torch.cat(
        [r.double().cumsum(1) / torch.arange(1, r.shape[1] + 1)[:, None] for r in rows.split(lengths, 1)], dim=1
    )
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, truth.float(), rtol=3e-6, atol=1e-6)
