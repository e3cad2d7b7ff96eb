"""`RoutingStats` in models that generate, have two sides, are wrapped, share routers or are checkpointed."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from lmoe_kernels import apply_lmoe, collect_router_logits
from lmoe_kernels.peft import LMoEConfig
from lmoe_kernels.routing import RoutingStats
from tests.models import llama, with_experts
from tests.routing import assert_same, collected, expected, ids, masked, mixture


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_a_cache_counts_what_the_whole_sequences_count(beams: int) -> None:
    model = mixture()
    batch = ids(2, 5)
    mask = torch.ones_like(batch)
    mask[0, :2] = 0
    keywords = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    with RoutingStats(model, labels=["a", "b"]) as stats, stats.label(torch.tensor([0, 1])):
        out = model.generate(batch, attention_mask=mask, use_cache=True, **keywords)
    handle.remove()
    assert [t.shape[1] for t in seen] == [5, 1, 1, 1]
    summary = stats.summary()
    if beams > 1:
        for found in summary.values():  # which beams were kept is not known here; their numbers are
            assert {k: v["tokens"] for k, v in found["labels"].items()} == {"a": beams * (3 + 3), "b": beams * (5 + 3)}
        return
    read = out[:, :-1]  # the last token is not read again
    full = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=1)
    logits = collected(model, read, attention_mask=full)
    for name, found in summary.items():
        assert_same(found, expected(logits[name][full.bool()]), rtol=1e-6)
        assert_same(found["labels"]["a"], expected(logits[name][0, 2:]), rtol=1e-6)


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).double().eval()
    apply_lmoe(model, ["q", "k", "wo"], num_experts=3, rank=2)
    return model


def test_encoder_and_decoder_have_their_own_masks_and_the_encoder_counts_once() -> None:
    model = t5()
    batch = ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    labels = ids(2, 4)
    labels[0, 2:] = -100
    with RoutingStats(model) as stats, torch.no_grad():
        model(input_ids=batch, attention_mask=mask, labels=labels)
    for name, found in stats.summary().items():
        of_encoder = name.startswith("encoder") or name.endswith("EncDecAttention.k")
        assert found["tokens"] == (10 if of_encoder else 6), name
    with RoutingStats(model) as stats:
        model.generate(batch, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for name, found in stats.summary().items():
        of_encoder = name.startswith("encoder") or name.endswith("EncDecAttention.k")
        assert found["tokens"] == (10 if of_encoder else 2 * 4), name


def wrapped_in_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"]))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("wrap", [wrapped_in_lora, compiled, compiled_in_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("keeps", [False, True])
def test_wrapped_models_count_each_token_once(wrap: Callable[[nn.Module], nn.Module], keeps: bool) -> None:
    plain = mixture(output_router_logits=keeps)
    batch = ids()
    mask = masked(batch)
    logits = collected(plain, batch, attention_mask=mask)
    model = wrap(plain)
    with torch.no_grad():
        if wrap is not compiled_in_place or not keeps:
            model(input_ids=batch, attention_mask=mask)  # a graph compiled before the statistics
        with RoutingStats(model) as stats:
            model(input_ids=batch, attention_mask=mask)
            model(batch, mask)
    for name, found in stats.summary().items():
        tokens = logits[name][mask.bool()]
        assert_same(found, expected(torch.cat([tokens, tokens])))
    with RoutingStats(model) as stats:
        model.generate(input_ids=batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert {found["tokens"] for found in stats.summary().values()} == {3 * (9 + 2)}


def test_layers_of_the_tuner_by_adapter() -> None:
    config = LMoEConfig(num_experts=3, r=2, target_modules=["q_proj", "down_proj"], gate_init_std=2.0)
    model = get_peft_model(llama(), config).double()
    model.add_adapter("other", config)
    batch = ids()
    mask = masked(batch)
    layers = [m for m in model.modules() if hasattr(m, "lmoe_options")]
    with RoutingStats(model) as stats, RoutingStats(model, adapter="other") as none:
        model(input_ids=batch, attention_mask=mask)
        logits = {name: layer.kept_router_logits()["default"] for name, layer in zip(stats.summary(), layers, strict=True)}
    for name, found in stats.summary().items():
        assert_same(found, expected(logits[name].detach()[mask.bool()]))
    assert len(logits) == 4
    with pytest.raises(ValueError, match="have run since"):
        none.summary()
    assert not any(layer.kept_router_logits() for layer in layers)
    assert not any(options.output_router_logits for layer in layers for options in layer.lmoe_options.values())
    model.base_model.set_adapter(["default", "other"])
    with RoutingStats(model) as both:
        model(input_ids=batch)
    assert list(both.summary())[:2] == ["model.layers.0.self_attn.q_proj.default", "model.layers.0.self_attn.q_proj.other"]
    with RoutingStats(model, adapter="other") as other:
        model.generate(input_ids=batch, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert {found["tokens"] for found in other.summary().values()} == {3 * 10}
    with model.disable_adapter(), RoutingStats(model) as disabled:
        model(input_ids=batch)
    with pytest.raises(ValueError, match="have run since"):
        disabled.summary()


@pytest.mark.parametrize("router", ["group", "block"])
def test_layers_that_share_a_router_have_its_statistics(router: str) -> None:
    model = llama()
    apply_lmoe(model, ["q_proj", "k_proj", "v_proj"], num_experts=3, rank=2, gate_init_std=2.0, router=router)
    batch = ids()
    logits = collected(model, batch)
    with RoutingStats(model) as stats, torch.no_grad():
        model(batch)
    summary = stats.summary()
    assert len(summary) == 6
    for name, found in summary.items():
        assert_same(found, expected(logits[name].flatten(0, 1)))
    gates = [found["mean_gate"] for found in summary.values()]
    assert gates[0] == gates[1] == gates[2] != gates[3]


@pytest.mark.filterwarnings("ignore:collect_router_logits")  # no loss is computed from these logits
@pytest.mark.parametrize("reentrant", [True, False])
def test_training_with_checkpointing_and_autocast_counts_each_token_once(reentrant: bool) -> None:
    model = with_experts(llama().float(), gate_init_std=1.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    batch = ids()
    with RoutingStats(model) as stats:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch, labels=batch).loss
            logits = collect_router_logits(model)
            loss.backward()
    for name, found in stats.summary().items():
        assert found["tokens"] == 2 * batch.numel()
        assert_same({**found, "tokens": batch.numel()}, expected(logits[name].detach().flatten(0, 1)), rtol=1e-4)
