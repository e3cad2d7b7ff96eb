"""The gate's bias on every path of the cuda backend: added once, in fp32, and its gradient."""

import pytest
import torch

from lmoe_kernels.options import Factors, Wanted
from tests import plans
from tests.problems import Case, make_problem
from tools import calls


@pytest.mark.parametrize("bias", ["rounded", "fp32"])
def test_the_saved_logits_hold_the_bias_added_once_in_fp32(bias: str, emulated_cuda, monkeypatch, watch) -> None:
    """On every path, bit for bit: exact dot products, and a bias that only fp32 holds, or one of x's dtype."""
    x = torch.randint(-8, 9, (35, 40)).bfloat16()
    gate_weight = torch.randint(-4, 5, (5, 40)).bfloat16()
    gate_bias = torch.randn(5) if bias == "fp32" else torch.randn(5).bfloat16()
    factors = Factors(torch.randn(5, 3, 40).bfloat16(), torch.randn(5, 3, 24).bfloat16(), gate_weight, gate_bias)
    expected = x.float() @ gate_weight.float().t() + gate_bias.float()
    for plan in ("decode", "one pass", "stages", "parts"):
        with monkeypatch.context() as patch:
            plans.force("cuda", plan, patch)
            _, saved = calls.forward_saved("cuda", x, factors)
            assert torch.equal(saved.logits, expected), plan


def test_the_bias_gets_the_sum_of_the_logits_gradients(emulated_cuda, watch) -> None:
    """In fp32 over x's dtype, and zeros without tokens; no other gradient is computed with it."""
    problem = make_problem(Case(T=130, gate_bias=True), torch.bfloat16)
    for bias in (problem.tensors["gate_bias"], problem.tensors["gate_bias"].float()):
        factors = calls.factors_of(problem.tensors | {"gate_bias": bias})
        wanted = Wanted(*[False] * 6)._replace(gate_bias=True)
        x, dlogits = problem.tensors["x"], torch.full((130, 5), 3.0)
        _, saved = calls.forward_saved("cuda", x, factors)
        grads = calls.backward("cuda", torch.zeros(130, 41).bfloat16(), None, factors, saved, dlogits=dlogits, wanted=wanted)
        assert [name for name, grad in grads._asdict().items() if grad is not None] == ["gate_bias"]
        assert grads.gate_bias.dtype == bias.dtype
        assert torch.equal(grads.gate_bias, torch.full((5,), 390.0).to(bias.dtype))  # bf16 cannot count to it in steps of 3
        none = saved._replace(logits=saved.logits[:0], u=saved.u[:0])
        grads = calls.backward("cuda", problem.dy[:0], None, factors, none, wanted=wanted)
        assert torch.equal(grads.gate_bias, torch.zeros_like(bias))
