"""`RoutingStats` against a recomputation from collected router logits in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmoe_kernels import LMoELinear, collect_router_logits, disable_lmoe, lmoe_layers
from lmoe_kernels.routing import RoutingStats
from tests.routing import assert_same, collected, expected, hooks, ids, masked, mixture


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
