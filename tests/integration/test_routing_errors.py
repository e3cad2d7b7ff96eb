"""What `RoutingStats` refuses, each with one line that leaves nothing behind, and what it warns of."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmoe_kernels import add_expert, lmoe_layers
from lmoe_kernels.routing import RoutingStats
from tests.models import llama
from tests.routing import hooks, ids, mixture


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
