"""Properties of every plan of every backend: v is rounded once, rows may lie far apart, base may have either shape."""

import pytest
import torch

from lmoe_kernels import lmoe, reference
from lmoe_kernels.options import Wanted
from tests.problems import Case, assert_all_no_worse, gradients, leaves_of, make_problem, outcome, plain_pytorch, truth
from tools.calls import backward, everything, factors_of, forward_saved
from tools.error_rule import assert_no_worse
from tools.far import far_apart


@pytest.mark.parametrize(
    ("mixing", "experts_of_a", "top_k"), [("factors", 3, 2), ("outputs", 3, 2), ("factors", 1, None)], ids=str
)
def test_v_is_rounded_once_forward_and_backward(mixing: str, experts_of_a: int, top_k: int | None, every_plan: str) -> None:
    """y and the gradient of B show v of the first expert: B selects that expert, and each token's dy selects one feature.

    u is exact, so that v = gate * h (or gate * u) is rounded once; rounding a factor of it first would give other numbers.
    """
    T, E = 128, 3
    x = torch.randint(1, 16, (T, 1)).bfloat16()
    lora_a = torch.tensor([3.0, 7.0, 13.0]).bfloat16()[:experts_of_a, None, None]
    lora_b = torch.zeros(E, 1, T)
    lora_b[0] = 1.0
    lora_b.requires_grad_()
    logits = torch.randn(T, E)
    logits[:, 0] += 1.0  # so that most tokens keep the first expert

    gates = reference.gate_softmax(logits, top_k)
    u = x.float() * lora_a.float().view(1, -1)
    gate, factor = gates[:, 0], ((gates * u).sum(dim=1) if mixing == "factors" else u[:, 0])
    once = (gate * factor).bfloat16().float()
    others = [(gate.bfloat16() * factor).bfloat16().float(), (gate.bfloat16() * factor.bfloat16()).float()]
    if mixing == "factors" and experts_of_a > 1:
        others.append((gate * factor.bfloat16()).bfloat16().float())
    for dx_too in (False, True):  # with dx, v comes from the backward of the mix
        x.requires_grad_(dx_too)
        y = lmoe(x, lora_a, lora_b, gate_logits=logits, mixing=mixing, top_k=top_k, backend=every_plan)
        (db,) = torch.autograd.grad(y, lora_b, torch.eye(T).bfloat16())
        for name, v in {"y": y[:, 0].float(), "dlora_b": db[0, 0]}.items():
            assert (v == once).float().mean() > 0.96, name  # the last bit of an exponential may change a rounding
            for other in others:
                assert (v == other).float().mean() < 0.95, name


@pytest.mark.parametrize("of_parameters", [torch.float32, None], ids=["fp32 parameters", "parameters like x"])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=35, gate_bias=True),
        Case(T=35, E=6, top_k=2, gate_bias=True, mixing="outputs", linear=True),
        Case(T=5, E=6, top_k=2, gate_bias=True, renormalize=False, shared_a=True),
    ],
    ids=str,
)
def test_the_gates_bias_is_added_once_and_gets_its_gradient(
    case: Case, of_parameters: torch.dtype | None, every_plan: str, watch
) -> None:
    problem = make_problem(case, torch.bfloat16, of_parameters)
    leaves = leaves_of(problem.tensors)
    assert_all_no_worse(problem, outcome(problem, problem.call(every_plan, **leaves), leaves))


def test_the_gates_bias_alone_gets_a_gradient(every_plan: str) -> None:
    problem = make_problem(Case(T=35, gate_bias=True), torch.float32)
    leaves = {"gate_bias": problem.tensors["gate_bias"].clone().requires_grad_()}
    assert_all_no_worse(problem, gradients(problem, problem.call(every_plan, **leaves), leaves))


@pytest.mark.parametrize(
    "case",
    [
        Case(T=21, E=6, top_k=2, gate_bias=True),
        Case(T=21, outside_logits=True),
        Case(T=21, outside_logits=True, softmax=False),
    ],
    ids=str,
)
def test_each_gradient_is_the_same_alone_and_the_others_are_none(case: Case, every_plan: str) -> None:
    problem = make_problem(case, torch.float32)
    x, factors = problem.tensors["x"], factors_of(problem.tensors)
    _, saved = forward_saved(every_plan, x, factors, case.options)
    every = backward(every_plan, problem.dy, x, factors, saved, case.options, dlogits=problem.dlogits)
    nothing, possible = Wanted(*[False] * 6), everything(factors)
    for name in Wanted._fields:
        if getattr(possible, name):
            wanted = nothing._replace(**{name: True})
            grads = backward(every_plan, problem.dy, x, factors, saved, case.options, dlogits=problem.dlogits, wanted=wanted)
            assert torch.equal(getattr(grads, name), getattr(every, name))
            assert [field for field in Wanted._fields if getattr(grads, field) is not None] == [name]
        else:
            assert getattr(every, name) is None


def test_rows_past_two_to_the_31_elements_forward_and_backward(every_plan: str) -> None:
    problem = make_problem(Case(T=5, I=24, O=16, top_k=2), torch.bfloat16)
    base, runs = torch.randn(5, 16).bfloat16(), []
    for place in (torch.clone, far_apart):
        leaves = leaves_of(problem.tensors)
        tensors = leaves | {"x": place(problem.tensors["x"])}
        y = lmoe(**tensors, base=place(base), top_k=2, backend=every_plan)
        runs.append([y, *torch.autograd.grad(y, [leaves[n] for n in leaves if n != "x"], place(problem.dy))])
    assert all(torch.equal(near, far) for near, far in zip(*runs, strict=True))


def test_base_is_one_bias_or_one_row_per_token(every_plan: str, watch) -> None:
    problem = make_problem(Case(T=35, top_k=2), torch.float32)
    t, true, plain = problem.tensors, truth(problem)["y"], [results["y"] for results in plain_pytorch(problem)]
    for base in (torch.randn(35, 41), torch.randn(35, 50)[:, :41]):
        y = lmoe(
            t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], base=base,
            scaling=problem.case.scaling, top_k=2, backend=every_plan,
        )  # fmt: skip
        assert_no_worse("y", y, [base + other for other in plain], base.double() + true)
    linear = make_problem(Case(T=35, top_k=2, linear=True), torch.float32)
    assert_all_no_worse(linear, {"y": linear.call(every_plan)[0]})
