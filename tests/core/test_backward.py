"""Backward of every backend: float64 truth, every subset of gradients, saved tensors, repeatability."""

from itertools import combinations

import pytest
import torch

from lmoe_kernels import lmoe
from tests.problems import (
    CASES,
    Case,
    Problem,
    assert_all_no_worse,
    gradients,
    leaves_of,
    make_problem,
    plain_pytorch,
    truth,
)
from tools.error_rule import assert_no_worse
from tools.far import far_apart

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_no_worse_than_plain_pytorch(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    problem = make_problem(case, dtype)
    _compare(problem, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:3] + CASES[5:9], ids=str)
def test_fp32_parameters_get_fp32_gradients(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    ours = _compare(make_problem(case, dtype, param_dtype=torch.float32), backend)
    for name in ("lora_a", "lora_b", "gate_weight"):
        gradient = ours[name]
        assert gradient.dtype == torch.float32
        assert case.T == 1 or not torch.equal(gradient, gradient.to(dtype).float()), f"{name} was rounded to {dtype}"


def _compare(problem: Problem, backend: str) -> dict[str, torch.Tensor]:
    leaves = leaves_of(problem.tensors)
    ours = gradients(problem, problem.call(backend, **leaves), leaves)
    for name, gradient in ours.items():
        assert gradient.dtype == leaves[name].dtype
    assert_all_no_worse(problem, ours)
    return ours


@pytest.mark.parametrize(
    "case",
    [
        Case(linear=True),
        Case(outside_logits=True, mixing="outputs", linear=True),
        Case(gate_bias=True, dropout=0.4),
        Case(outside_logits=True, dropout=0.4),
    ],
    ids=str,
)
def test_every_subset_of_gradients(case: Case, backend: str, exact: torch.dtype, watch) -> None:
    problem = make_problem(case, exact)
    leaves, true, plain = leaves_of(problem.tensors), truth(problem), list(plain_pytorch(problem))
    for count in range(1, len(leaves) + 1):
        for chosen in combinations(leaves, count):
            some = {name: leaves[name] if name in chosen else t for name, t in problem.tensors.items()}
            y, logits = problem.call(backend, **some)
            loss = (y * problem.dy).sum()
            if logits.requires_grad:
                loss = loss + (logits * problem.dlogits).sum()
            got = torch.autograd.grad(loss, [leaves[name] for name in chosen])
            for name, gradient in zip(chosen, got, strict=True):
                assert_no_worse(f"{name} of {chosen}", gradient, [results[name] for results in plain], true[name])


@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_loss_on_router_logits_alone(mixing: str, backend: str, exact: torch.dtype, watch) -> None:
    problem = make_problem(Case(mixing=mixing), exact)
    problem.dy.zero_()
    leaves = leaves_of(problem.tensors)
    _, logits = problem.call(backend, **leaves)
    dx, dgate = torch.autograd.grad((logits * problem.dlogits).sum(), [leaves["x"], leaves["gate_weight"]])
    assert_all_no_worse(problem, {"x": dx, "gate_weight": dgate})


def test_gradient_of_base(backend: str, exact: torch.dtype, watch) -> None:
    t = make_problem(Case(), exact).tensors
    base, dy = torch.randn(7, 41, dtype=exact, requires_grad=True), torch.randn(7, 41, dtype=exact)
    y = lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], base=base, backend=backend)
    assert torch.equal(torch.autograd.grad(y, base, dy)[0], dy)


def test_broadcast_and_strided_incoming_gradients(backend: str, exact: torch.dtype, watch) -> None:
    problem = make_problem(Case(linear=True), exact)
    leaves = leaves_of(problem.tensors)
    y, _ = problem.call(backend, **leaves)
    problem.dlogits.zero_()
    for dy in (torch.ones((), dtype=exact).expand_as(y), problem.dy.t().contiguous().t()):
        problem.dy = dy
        strided = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
        assert_all_no_worse(problem, dict(zip(leaves, strided, strict=True)))


def test_rows_past_two_to_the_31_elements(backend: str) -> None:
    problem = make_problem(Case(T=3, I=24, O=17), torch.bfloat16)
    leaves, far_leaves = leaves_of(problem.tensors), leaves_of(problem.tensors)
    y, far_y = (problem.call(backend, **some)[0] for some in (leaves, far_leaves | {"x": far_apart(problem.tensors["x"])}))
    wanted = ("lora_a", "lora_b", "gate_weight")
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], problem.dy)
    far = torch.autograd.grad(far_y, [far_leaves[name] for name in wanted], far_apart(problem.dy))
    assert all(torch.equal(a, b) for a, b in zip(grads, far, strict=True))


def test_two_backwards_give_the_same_bits_and_do_not_change_saved_tensors(backend: str) -> None:
    problem = make_problem(Case(T=130, I=136, O=72, E=8, R=16, linear=True), torch.bfloat16)
    leaves = leaves_of(problem.tensors)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = problem.call(backend, **leaves)
    before = [t.clone() for t in saved]
    y, logits = results
    loss = (y * problem.dy).sum() + (logits * problem.dlogits).sum()
    first, second = (torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved, before, strict=True))


def test_second_derivatives_are_refused(backend: str, exact: torch.dtype) -> None:
    leaves = leaves_of(make_problem(Case(), exact).tensors)
    y = lmoe(leaves["x"], leaves["lora_a"], leaves["lora_b"], gate_weight=leaves["gate_weight"], backend=backend)
    with pytest.raises(RuntimeError, match="create_graph must be False, got True: there are no second derivatives"):
        torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
