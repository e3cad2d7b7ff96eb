"""`RoutingStats` against a recomputation from collected router logits in float64."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lmoe_kernels import LMoELinear, add_expert, apply_lmoe, collect_router_logits, disable_lmoe, lmoe_layers
from lmoe_kernels.peft import LMoEConfig
from lmoe_kernels.routing import RoutingStats
from tests.models import llama, with_experts

NAMES = ["tokens", "mean_gate", "load", "entropy_bits", "experts_per_token", "effective_experts"]


def ids(rows: int = 3, columns: int = 9) -> Tensor:
    return torch.randint(1, 32, (rows, columns))


def mixture(**options: Any) -> LlamaForCausalLM:
    return with_experts(llama(), **{"gate_init_std": 2.0, **options})


def collected(model: nn.Module, *args: Any, **keywords: Any) -> dict[str, Tensor]:
    """The router logits of a forward, from layers that keep them."""
    before = [layer.output_router_logits for layer in lmoe_layers(model).values()]
    for layer in lmoe_layers(model).values():
        layer.output_router_logits = True
    with torch.no_grad():
        model(*args, **keywords)
        logits = {name: t.clone() for name, t in collect_router_logits(model).items()}
    for layer, kept in zip(lmoe_layers(model).values(), before, strict=True):
        layer.output_router_logits, layer.router_logits = kept, None
    return logits


def expected(logits: Tensor, top_k: int | None = None, bias: Tensor | None = None) -> dict[str, Any]:
    """The statistics of tokens (T, E), one token after another, in Python's floats."""
    experts = logits.shape[1]
    kept = top_k or experts
    gates, load, entropy = [0.0] * experts, [0.0] * experts, 0.0
    for token in logits.double():
        ranked = token if bias is None else token + bias
        order = sorted(range(experts), key=lambda e: -ranked[e].item())
        powers = {e: math.exp(token[e].item()) for e in order[:kept]}
        for e, power in powers.items():
            gate = power / sum(powers.values())
            gates[e] += gate / len(logits)
            entropy -= gate * math.log2(gate) / len(logits)
        for e in order[: top_k or 1]:
            load[e] += 1 / len(logits)
    effective = 2 ** -sum(gate * math.log2(gate) for gate in gates if gate > 0)
    values = [len(logits), gates, load, entropy, 2**entropy, effective]
    return dict(zip(NAMES, values, strict=True))


def assert_same(found: dict[str, Any], wanted: dict[str, Any], rtol: float = 1e-9) -> None:
    for name in NAMES:
        torch.testing.assert_close(
            torch.tensor(found[name], dtype=torch.float64),
            torch.tensor(wanted[name], dtype=torch.float64),
            rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2},
        {"top_k": 2, "renormalize": False},
        {"top_k": 2, "choice_bias": True},
        {"top_k": 3},
        {"gate_bias": True},
    ],
    ids=str,
)
def test_statistics_are_those_of_the_collected_logits(options: dict[str, Any]) -> None:
    model = mixture(**options)
    layers = lmoe_layers(model)
    for layer in layers.values():
        if layer.choice_bias is not None:
            layer.choice_bias.normal_(std=3)
        if layer.gate_bias is not None:
            nn.init.normal_(layer.gate_bias)
    batches = [ids(), ids(2, 5)]
    logits = [collected(model, batch) for batch in batches]
    with RoutingStats(model) as stats, torch.no_grad():
        for batch in batches:
            model(batch)
    summary = stats.summary()
    assert list(summary) == list(layers)
    for name, found in summary.items():
        tokens = torch.cat([of_batch[name].flatten(0, -2) for of_batch in logits])
        assert_same(found, expected(tokens, options.get("top_k"), layers[name].choice_bias))
        assert found["experts"] == ["0", "1", "2"]
        assert "label_bits" not in found


def test_labels_of_blocks_and_of_sequences() -> None:
    model = mixture()
    batch = ids(4)
    logits = collected(model, batch)
    with RoutingStats(model, labels=["a", "b", "none of these"]) as stats, torch.no_grad():
        with stats.label("a"):
            model(batch[:1])
            with stats.label(torch.tensor([1, -1])):
                model(batch[1:3])
        model(batch[3:])
        with stats.label("b"):
            model(batch[3:])
    for name, found in stats.summary().items():
        of_label = {"a": logits[name][0], "b": torch.cat([logits[name][1], logits[name][3]])}
        assert found["labels"].keys() == of_label.keys()
        for label, tokens in of_label.items():
            assert_same(found["labels"][label], expected(tokens))
        assert_same(found, expected(torch.cat([logits[name][[0, 1, 2, 3]].flatten(0, 1), logits[name][3]])))
        gates = torch.tensor([found["labels"][label]["mean_gate"] for label in of_label])
        bits = (gates * (gates / gates.mean(dim=0)).log2()).sum(dim=1).mean().item()
        assert found["label_bits"] == pytest.approx(bits, rel=1e-3, abs=1e-6)
        assert found["label_bits"] > 0


def test_information_is_one_bit_if_two_labels_use_two_experts_and_zero_if_they_use_the_same() -> None:
    layer = LMoELinear(2, 2, num_experts=2, rank=1)
    with torch.no_grad():
        layer.gate_weight.copy_(torch.tensor([[99.0, 0.0], [0.0, 99.0]]))
    for second, bits in ((torch.tensor([0.0, 1.0]), 1.0), (torch.tensor([1.0, 0.0]), 0.0)):
        with RoutingStats(layer, labels=["a", "b"]) as stats:
            for label, x, tokens in (("a", torch.tensor([1.0, 0.0]), 3), ("b", second, 5)):
                with stats.label(label):
                    layer(x.expand(1, tokens, 2))
        assert stats.summary()[""]["label_bits"] == pytest.approx(bits, abs=1e-6)


def masked(batch: Tensor) -> Tensor:
    mask = torch.ones_like(batch)
    mask[0, :4], mask[1, :1] = 0, 0
    return mask


@pytest.mark.parametrize("given", ["keyword", "position", "user"])
def test_masked_tokens_do_not_count(given: str) -> None:
    model = mixture()
    batch = ids()
    mask = masked(batch)
    logits = collected(model, batch, attention_mask=None if given == "user" else mask)
    with RoutingStats(model, labels=["a", "b"]) as stats, torch.no_grad(), stats.label(torch.tensor([0, 1, 1])):
        if given == "keyword":
            model(input_ids=batch, attention_mask=mask)
        elif given == "position":
            model(batch, mask)
        else:
            stats.mask = mask.bool()
            model(batch)
    for name, found in stats.summary().items():
        assert_same(found, expected(logits[name][mask.bool()]))
        assert_same(found["labels"]["a"], expected(logits[name][0, 4:]))


def test_a_masked_token_may_be_nan() -> None:
    layer = LMoELinear(4, 4, num_experts=3, rank=1)
    x = torch.randn(2, 5, 4)
    with RoutingStats(layer) as whole:
        layer(x[:, :4])
    x[:, 4] = math.nan
    with RoutingStats(layer) as stats:
        stats.mask = torch.tensor([[1, 1, 1, 1, 0]] * 2)
        layer(x)
    assert_same(stats.summary()[""], whole.summary()[""], rtol=1e-6)


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


def test_statistics_do_not_change_the_model() -> None:
    model = mixture(dropout=0.2).train()
    batch = ids()

    def step() -> list[Tensor]:
        torch.manual_seed(5)  # the same dropout twice
        model.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    without = step()
    with RoutingStats(model):
        inside = step()
    for a, b in zip(without, inside, strict=True):
        assert torch.equal(a, b)


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules()]


def test_nothing_is_left_after_the_block() -> None:
    model = mixture()
    first = next(iter(lmoe_layers(model).values()))
    first.output_router_logits = True
    before = hooks(model)

    class StopTrainingError(Exception):
        pass

    def run() -> None:
        with RoutingStats(model):
            assert all(layer.output_router_logits for layer in lmoe_layers(model).values())
            model(ids())
            raise StopTrainingError

    with pytest.raises(StopTrainingError):
        run()
    assert hooks(model) == before
    assert [layer.output_router_logits for layer in lmoe_layers(model).values()] == [True, False, False, False]
    assert list(collect_router_logits(model)) == ["model.layers.0.self_attn.q_proj"]


def test_counting_goes_on_in_a_second_block_and_not_between() -> None:
    model = mixture()
    stats = RoutingStats(model)
    for _ in range(2):
        with stats:
            model(ids(2, 5))
        model(ids(2, 5))
    assert {found["tokens"] for found in stats.summary().values()} == {20}
    stats.stop()
    stats.start()
    with pytest.raises(ValueError, match=r"^RoutingStats: start must be called once before stop, got a second call$"):
        stats.start()
    stats.stop()


def test_inference_mode_and_disabled_layers() -> None:
    model = mixture()
    with RoutingStats(model) as stats:
        with torch.inference_mode():
            model(ids(2, 5))
        model(ids(2, 5))
        with disable_lmoe(model):
            model(ids(2, 5))
    assert {found["tokens"] for found in stats.summary().values()} == {20}


def test_logits_kept_from_before_do_not_count() -> None:
    """The second layer does not run within the block, and still holds the logits of an earlier forward."""
    model = nn.Sequential(*(LMoELinear(4, 4, num_experts=2, rank=1, output_router_logits=True) for _ in range(2)))
    x = torch.randn(3, 4)
    model(x)
    model.forward = lambda x: model[0](x)
    with RoutingStats(model) as stats:
        model(x)
    assert list(stats.summary()) == ["0"]


def test_long_runs_stay_exact() -> None:
    """In fp32, 2^24 tokens and one more are 2^24 tokens."""
    layer = LMoELinear(2, 2, num_experts=2, rank=1)
    with RoutingStats(layer) as stats:
        layer(torch.randn(1, 2))
        (group,) = stats._sums
        stats._sums[group] += torch.tensor(2.0**24)
        layer(torch.randn(1, 2))
    assert stats.sums().layers[""].sums[0, -1] == 2**24 + 2


def test_drift_has_the_mean_gates_between_the_snapshots() -> None:
    model = mixture()
    batches = [ids(), ids(), ids()]
    logits = [collected(model, batch) for batch in batches]
    with RoutingStats(model, labels=["a"]) as stats:
        model(batches[0])
        stats.snapshot(10)
        with stats.label("a"):
            model(batches[1])
            model(batches[2])
        stats.snapshot(25)
        stats.snapshot(30)
    first, second, empty = stats.sums().drift()
    assert [first["step"], second["step"], empty["step"]] == [10, 25, 30]
    assert empty["mean_gate"] == {}
    for name in first["mean_gate"]:
        later = torch.cat([logits[1][name], logits[2][name]]).flatten(0, 1)
        for found, tokens in ((first, logits[0][name].flatten(0, 1)), (second, later)):
            assert found["mean_gate"][name] == pytest.approx(expected(tokens)["mean_gate"], rel=1e-9)
    with pytest.raises(ValueError, match=r"^RoutingStats.snapshot: step must be larger than .* 30, got 30$"):
        stats.snapshot(30)
    with pytest.raises(TypeError, match=r"^RoutingStats.snapshot: step must be an int, got float$"):
        stats.snapshot(31.0)


def test_a_mask_of_four_dimensions_is_not_read_and_says_so() -> None:
    model = mixture()
    batch = ids(2, 5)
    causal = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with warnings.catch_warnings(), RoutingStats(model) as stats:
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match=r"every token counts, padding included; set stats\.mask"):
            model(batch, attention_mask=causal)
    assert {found["tokens"] for found in stats.summary().values()} == {10}


def run_with(stats: RoutingStats, batch: Tensor, label: Any = None, mask: Tensor | None = None) -> None:
    with stats:
        stats.mask = mask
        if label is None:
            stats._model(batch)
        else:
            with stats.label(label):
                stats._model(batch)


def mistakes() -> Iterator[tuple[str, Callable[[nn.Module], Any], type[Exception], str]]:
    two = ["a", "b"]
    fail = "RoutingStats: model must have layers with experts, got none"
    yield "no layers", lambda m: RoutingStats(llama()), ValueError, fail
    yield "no model", lambda m: RoutingStats(3), TypeError, "RoutingStats: model must be a torch.nn.Module, got int"
    fail = "RoutingStats: adapter must be one of 'default', got 'other'"
    yield "no such adapter", lambda m: RoutingStats(m, adapter="other"), ValueError, fail
    fail = "RoutingStats: labels must be a list of str, got 'ab'"
    yield "one str", lambda m: RoutingStats(m, labels="ab"), TypeError, fail
    fail = "RoutingStats: labels must be different from one another, got ['a', 'a']"
    yield "labels twice", lambda m: RoutingStats(m, labels=["a", "a"]), ValueError, fail
    must = "have run since the statistics began (RoutingStats counts in its `with` block)"
    fail = f"RoutingStats: model must {must}, got no token"
    yield "not run", lambda m: RoutingStats(m).summary(), ValueError, fail
    yield "all masked", lambda m: masked_entirely(m), ValueError, fail
    fail = "RoutingStats.label: label must be one of the labels 'a', 'b', got 'c'"
    yield "unknown label", lambda m: run_with(RoutingStats(m, labels=two), ids(), "c"), ValueError, fail
    fail = "RoutingStats.label: label must be one of the labels (none), got 'c'"
    yield "no labels", lambda m: run_with(RoutingStats(m), ids(), "c"), ValueError, fail
    fail = "RoutingStats.label: label must be used with RoutingStats(labels=...), got (3,)"
    yield "no labels, a tensor", lambda m: run_with(RoutingStats(m), ids(), torch.zeros(3).long()), ValueError, fail
    fail = "RoutingStats.label: label must have shape (B), one number for each sequence, got (3, 1)"
    label = torch.zeros(3, 1).long()
    yield "label of two dimensions", lambda m: run_with(RoutingStats(m, labels=two), ids(), label), ValueError, fail
    fail = "RoutingStats.label: label must be a str or an integer tensor, got torch.float32"
    yield "label of floats", lambda m: run_with(RoutingStats(m, labels=two), ids(), torch.zeros(3)), TypeError, fail
    fail = "RoutingStats.label: label must be a str or an integer tensor, got int"
    yield "label of a number", lambda m: run_with(RoutingStats(m, labels=two), ids(), 1), TypeError, fail
    fail = "RoutingStats.label: label must have one number for each of 4 sequences, got 2"
    label2 = torch.zeros(2).long()
    yield "too few labels", lambda m: run_with(RoutingStats(m, labels=two), ids(4), label2), ValueError, fail
    fail = "RoutingStats: mask must have the shape (3, 9) of the tokens, got (3, 8)"
    yield "mask", lambda m: run_with(RoutingStats(m), ids(), mask=torch.ones(3, 8)), ValueError, fail
    fail = "RoutingStats: 'model.layers.0.self_attn.q_proj' must keep its number of experts while it is counted, got 3 and 4"
    yield "another number of experts", more_experts, ValueError, fail


def masked_entirely(model: nn.Module) -> None:
    stats = RoutingStats(model)
    run_with(stats, ids(), mask=torch.zeros(3, 9))
    stats.summary()


def more_experts(model: nn.Module) -> None:
    with RoutingStats(model) as stats:
        model(ids())
        add_expert(model, "new")
        model(ids())
    stats.summary()


MISTAKES = {name: rest for name, *rest in mistakes()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_one_line(mistake: str) -> None:
    cause, error, text = MISTAKES[mistake]
    model = mixture()
    before = hooks(model)
    with pytest.raises(error) as caught:
        cause(model)
    assert str(caught.value) == text
    assert hooks(model) == before
    assert not any(layer.output_router_logits for layer in lmoe_layers(model).values())
