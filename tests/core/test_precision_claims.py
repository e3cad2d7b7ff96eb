"""What is rounded and what is not: a test for each claim, on numbers for which one more rounding changes the result."""

from dataclasses import replace

import pytest
import torch

from lmoe_kernels import lmoe, lmoe_linear
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALVES
@pytest.mark.parametrize("outside", [True, False], ids=["gate_logits", "gate_weight"])
def test_gates_are_not_rounded_before_they_are_multiplied(outside: bool, dtype: torch.dtype, backend: str) -> None:
    """Forward and backward use unrounded gates: B selects an expert and dy selects a token, so that both show gate * u.

    With gate_weight the logits are exact in fp32 but not in half precision; an outside router's are given in half precision.
    """
    tokens, experts = 200, 4
    u, other = torch.randint(1, 64, (tokens,)), torch.randn(tokens).to(dtype)
    x = torch.stack([u.to(dtype), other], dim=1)
    logits, of_other = torch.randn(tokens, experts).to(dtype), torch.randn(experts).to(dtype)
    gate_weight = torch.stack([torch.zeros_like(of_other), of_other], dim=1)
    gate = {"gate_logits": logits} if outside else {"gate_weight": gate_weight}
    lora_a = torch.tensor([[[1.0, 0.0]]], dtype=dtype)
    lora_b = torch.eye(experts, tokens, dtype=dtype)[:, None].requires_grad_()
    y = lmoe(x, lora_a, lora_b, **gate, backend=backend)
    (dlora_b,) = torch.autograd.grad(y, lora_b, torch.eye(tokens, dtype=dtype))

    exact = logits.double() if outside else other.double()[:, None] * of_other.double()
    once = (exact.softmax(dim=1) * u[:, None]).to(dtype)
    twice = (exact.softmax(dim=1).to(dtype).double() * u[:, None]).to(dtype)
    assert (once == twice).float().mean() < 0.9, "these numbers do not distinguish one rounding from two"
    for name, v in (("forward", y[:, :experts]), ("backward", dlora_b[:, 0].t())):
        share = (v == once).float().mean()
        assert share > 0.97, f"{name}: {share} rounded once"  # the last bit of an exponential may change a rounding


def _signs(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Random signs and powers of two: multiplying by them changes no rounding."""
    return torch.ldexp(torch.randint(2, (tokens, 1)) * 2.0 - 1, torch.randint(-3, 4, (tokens, 1))).to(dtype)


@HALVES
@pytest.mark.parametrize("tokens", [5, 70], ids=["few tokens", "many tokens"])
def test_base_and_delta_are_summed_before_they_are_rounded(tokens: int, dtype: torch.dtype, backend: str) -> None:
    """base + delta is a little more than 1 + eps / 2 and rounds up; with a delta rounded first it is a tie, rounded to 1."""
    eps = torch.finfo(dtype).eps
    x = _signs(tokens, dtype).expand(-1, 2).contiguous()
    lora_a, gate_weight = torch.eye(2, dtype=dtype)[None], torch.zeros(1, 2, dtype=dtype)
    lora_b = torch.tensor([1.0, eps / 4], dtype=dtype)[None, :, None]
    y = lmoe(x, lora_a, lora_b, gate_weight=gate_weight, base=x[:, :1], scaling=eps / 2, backend=backend)
    assert torch.equal(y, x[:, :1] * (1 + eps))


@HALVES
@pytest.mark.parametrize("tokens", [5, 70], ids=["few tokens", "many tokens"])
def test_the_frozen_product_is_not_rounded_before_the_sum(tokens: int, dtype: torch.dtype, backend: str) -> None:
    """The frozen product is 1 + eps / 2, a tie: rounded by itself it is 1, and the small delta no longer changes the sum."""
    eps = torch.finfo(dtype).eps
    x = _signs(tokens, dtype) * torch.tensor([1.0, eps / 2], dtype=dtype)
    weight, lora_a = torch.ones(1, 2, dtype=dtype), torch.tensor([[[1.0, 0.0]]], dtype=dtype)
    lora_b, gate_weight = torch.full((1, 1, 1), eps / 8, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    y = lmoe_linear(x, weight, None, lora_a, lora_b, gate_weight=gate_weight, backend=backend)
    assert torch.equal(y, x[:, :1] * (1 + eps))


@HALVES
@pytest.mark.parametrize("scaling", [1e-3, 300.0])
@pytest.mark.parametrize("case", [Case(), Case(mixing="outputs"), Case(T=1, shared_a=True)], ids=str)
def test_a_small_or_large_scaling_costs_no_precision(case: Case, scaling: float, dtype: torch.dtype, watch) -> None:
    """The torch backend scales the gates, in fp32: what it rounds to half precision is scaled already."""
    problem = make_problem(replace(case, scaling=scaling), dtype)
    leaves = leaves_of(problem.tensors)
    assert_all_no_worse(problem, outcome(problem, problem.call("torch", **leaves), leaves))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of padded experts in the interpreter
@pytest.mark.parametrize("offset", [-5e4, 5e4])
@pytest.mark.parametrize("case", [Case(outside_logits=True), Case(T=19, E=8, top_k=2, outside_logits=True)], ids=str)
def test_router_logits_may_be_far_from_zero(case: Case, offset: float, backend: str, watch) -> None:
    """The softmax does not overflow, and the gate of a dropped expert is 0 however low the kept logits are."""
    problem = make_problem(case, torch.float32)
    problem.tensors["gate_logits"] += offset
    leaves = leaves_of(problem.tensors)
    assert_all_no_worse(problem, outcome(problem, problem.call(backend, **leaves), leaves))
