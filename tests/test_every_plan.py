"""What every backend owes on each of its plans: v rounded once, a bias for all tokens or a row for each."""

import pytest
import torch

from lmoe_kernels import lmoe
from tests.problems import Case, assert_all_no_worse, assert_no_worse, make_problem, plain_pytorch, truth


@pytest.mark.parametrize("experts_of_a", [3, 1], ids=["own a", "shared a"])
@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_v_is_rounded_once_forward_and_backward(mixing: str, experts_of_a: int, every_plan: str) -> None:
    """v of the first expert is seen as y, where B picks it, and as dB, where each token's dy picks a feature of its own.

    u is exact, so that v = gate h, or gate u, is the only rounding; either of its two factors rounded before would show.
    """
    T, E = 200, 3
    x = torch.randint(1, 16, (T, 1)).bfloat16()
    lora_a = torch.tensor([3.0, 7.0, 13.0]).bfloat16()[:experts_of_a, None, None]
    lora_b = torch.zeros(E, 1, T)
    lora_b[0] = 1.0
    lora_b.requires_grad_()
    logits = torch.randn(T, E)
    y = lmoe(x, lora_a, lora_b, gate_logits=logits, mixing=mixing, backend=every_plan)
    (db,) = torch.autograd.grad(y, lora_b, torch.eye(T).bfloat16())

    gates = logits.softmax(dim=1)
    u = x.float() * lora_a.float().view(1, -1)
    gate, factor = gates[:, 0], ((gates * u).sum(dim=1) if mixing == "factors" else u[:, 0])
    once = (gate * factor).bfloat16().float()
    others = [(gate.bfloat16() * factor).bfloat16().float(), (gate.bfloat16() * factor.bfloat16()).float()]
    if mixing == "factors" and experts_of_a > 1:
        others.append((gate * factor.bfloat16()).bfloat16().float())
    for name, v in {"y": y[:, 0].float(), "dlora_b": db[0, 0]}.items():
        assert (v == once).float().mean() > 0.96, name  # the last bit of an exponential may tip a rounding
        for other in others:
            assert (v == other).float().mean() < 0.9, name


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_bias_for_all_tokens_or_a_row_for_each(top_k: int | None, every_plan: str, watch) -> None:
    problem = make_problem(Case(T=35, top_k=top_k), torch.float32)
    t, true, plain = problem.tensors, truth(problem)["y"], [results["y"] for results in plain_pytorch(problem)]
    for base in (torch.randn(35, 41), torch.randn(35, 50)[:, :41]):
        y = lmoe(
            t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], base=base,
            scaling=problem.case.scaling, top_k=top_k, backend=every_plan,
        )  # fmt: skip
        assert_no_worse("y", y, [base + other for other in plain], base.double() + true)
    linear = make_problem(Case(T=35, top_k=top_k, linear=True), torch.float32)
    assert_all_no_worse(linear, {"y": linear.call(every_plan)[0]})
