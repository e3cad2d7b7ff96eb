"""renormalize=False: the gate's gradient, calls in which it changes nothing, and logits at the limits of the exponential."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmoe_kernels import LMoELinear, explain, lmoe, load_lmoe, reference, save_lmoe
from tests.problems import Case, Problem, assert_all_no_worse, gradients, leaves_of, make_problem, outcome

GROUPED = {"T": 40, "I": 20, "O": 24, "E": 12, "R": 6}  # Triton groups these tokens by expert if top_k is 1
SHAPES = [Case(T=9, E=4, top_k=1), Case(**GROUPED, top_k=1)]


def _of(case: Case, **options) -> Case:
    return Case(**{**vars(case), **options})


@pytest.mark.parametrize("mixing", ["factors", "outputs"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_gate_of_one_kept_expert_learns_from_the_output(case: Case, mixing: str, backend: str, watch) -> None:
    """A renormalised gate of one expert is always 1, so that the gradient of the logits is exactly zero."""
    problem = make_problem(_of(case, mixing=mixing), torch.float32)
    for renormalize in (True, False):
        problem.case = _of(problem.case, renormalize=renormalize)
        leaves = leaves_of(problem.tensors)
        y, _ = problem.call(backend, **leaves)
        (gradient,) = torch.autograd.grad((y * problem.dy).sum(), leaves["gate_weight"])
        assert (gradient == 0).all() if renormalize else (gradient != 0).all()


def test_dropped_experts_get_gradients_through_the_denominator(backend: str, watch) -> None:
    """Their logits get a gradient, and the gradients of all logits of a token sum to zero."""
    problem = make_problem(Case(T=40, E=6, top_k=2, renormalize=False, outside_logits=True), torch.float32)
    problem.dlogits.zero_()
    leaves = leaves_of(problem.tensors)
    gradient = gradients(problem, problem.call(backend, **leaves), leaves)["gate_logits"]
    dropped = ~reference.kept_experts(problem.tensors["gate_logits"], 2)
    assert (gradient[dropped] != 0).all()
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(40), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared_a", [False, True], ids=["own_a", "shared_a"])
@pytest.mark.parametrize("top_k", [None, 4])
def test_renormalize_changes_nothing_if_all_experts_are_kept(top_k: int | None, shared_a: bool, backend: str) -> None:
    problem = make_problem(Case(E=4, top_k=top_k, shared_a=shared_a), torch.bfloat16)
    results = []
    for renormalize in (True, False):
        problem.case = _of(problem.case, renormalize=renormalize)
        leaves = leaves_of(problem.tensors)
        results.append(outcome(problem, problem.call(backend, **leaves), leaves))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def _compare(problem: Problem, backend: str) -> None:
    leaves = leaves_of(problem.tensors)
    y, logits = problem.call(backend, **leaves)
    assert_all_no_worse(problem, {"y": y.detach()} | gradients(problem, (y, logits), leaves))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # Triton's interpreter computes padded experts too
@pytest.mark.parametrize("far", [-300.0, 300.0])
@pytest.mark.parametrize("shape", [{}, GROUPED], ids=["few", "many experts"])
def test_logits_far_from_zero(shape: dict, far: float, backend: str, watch) -> None:
    """exp(300) is beyond fp32: the largest logit is subtracted first."""
    top_k = 1 if shape else 2
    problem = make_problem(Case(**shape, top_k=top_k, renormalize=False, outside_logits=True), torch.float32)
    problem.tensors["gate_logits"] += far
    _compare(problem, backend)


@pytest.mark.parametrize("masked", [1, 4])
def test_experts_masked_by_minus_infinity(masked: int, backend: str, watch) -> None:
    """If four of five experts are masked and two are kept, the second gate is 0 and nothing is NaN."""
    problem = make_problem(Case(top_k=2, renormalize=False, outside_logits=True), torch.float32)
    problem.tensors["gate_logits"][:, -masked:] = float("-inf")
    _compare(problem, backend)


@pytest.mark.parametrize("place", [0, 3], ids=["kept", "dropped without it"])
def test_a_nan_in_the_logits_affects_its_token_alone(place: int, backend: str) -> None:
    t = make_problem(Case(outside_logits=True), torch.float32).tensors
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).repeat(7, 1)
    logits[2, place] = float("nan")
    leaf = logits.requires_grad_()
    y = lmoe(t["x"], t["lora_a"], t["lora_b"], gate_logits=leaf, top_k=2, renormalize=False, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    for result in (y, gradient):
        assert result[2].isnan().all()
        assert result[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_gate_softmax_keeps_gates_of_the_softmax_over_all_experts() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    softmax = logits.softmax(dim=-1)
    kept = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    torch.testing.assert_close(reference.gate_softmax(logits, 2, renormalize=False), softmax * kept)


def test_explain_accepts_renormalize() -> None:
    t = make_problem(Case(), torch.float32).tensors
    assert "taken" in explain(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], top_k=1, renormalize=False)


def test_the_layer_keeps_renormalize_and_passes_it_on() -> None:
    layer = LMoELinear(8, 12, num_experts=4, rank=2, top_k=1, renormalize=False, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 8, dtype=torch.float64)
    delta = lmoe(
        x, layer.lora_a, layer.lora_b, gate_weight=layer.gate_weight, scaling=layer.scaling, top_k=1, renormalize=False
    )
    torch.testing.assert_close(layer(x), layer.frozen_layer(x) + delta)
    layer(x).square().sum().backward()
    assert layer.gate_weight.grad is not None
    assert layer.gate_weight.grad.abs().max() > 0
    assert layer.config()["renormalize"] is False
    assert "top_k=1, renormalize=False" in repr(layer)
    assert "renormalize" not in repr(LMoELinear(8, 12, num_experts=4, rank=2, top_k=2))


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_keeps_renormalize_and_version_1_means_renormalised_gates(version: int, tmp_path: Path) -> None:
    layer = LMoELinear(8, 12, num_experts=4, rank=2, top_k=2, renormalize=version == 1)
    torch.nn.init.normal_(layer.lora_b)
    save_lmoe(torch.nn.Sequential(layer), tmp_path)
    if version == 1:
        config = json.loads((tmp_path / "lmoe_config.json").read_text())
        del config["layers"]["0"]["renormalize"]
        old = {"format": "lmoe_kernels", "version": 1, "layers": config["layers"]}
        (tmp_path / "lmoe_config.json").write_text(json.dumps(old))
        save_file(load_file(tmp_path / "lmoe.safetensors"), tmp_path / "lmoe.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(8, 12))
    other[0].load_state_dict(layer.frozen_layer.state_dict())
    load_lmoe(other, tmp_path)
    assert other[0].renormalize == layer.renormalize
    x = torch.randn(3, 8)
    assert torch.equal(other(x), layer(x))


def test_a_layer_whose_gate_would_not_learn_warns_once() -> None:
    text = "the kept gate is always 1, so the language-modelling loss does not train the gate; pass renormalize=False"
    with pytest.warns(UserWarning, match=text) as caught:
        layer = LMoELinear(8, 12, num_experts=4, rank=2, top_k=1)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=text):
        LMoELinear.from_linear(torch.nn.Linear(8, 12), num_experts=4, rank=2, top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 8))
        for options in ({"top_k": 1, "renormalize": False}, {"top_k": 2}, {"top_k": 1, "num_experts": 1}, {}):
            LMoELinear(8, 12, **{"num_experts": 4, "rank": 2} | options)
