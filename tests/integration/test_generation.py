"""Routers in a generation: steps with a cache give what one forward gives, under padding, packing, beams and static caches."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, T5Config,
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
