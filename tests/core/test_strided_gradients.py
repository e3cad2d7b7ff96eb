"""Tensors with any strides give the results of their contiguous copies, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmoe_kernels import lmoe
from tests.problems import Case, assert_all_no_worse, make_problem


def _transposed(t: Tensor) -> Tensor:
    """The same numbers with the last two dims stored in the opposite order."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def _every_second(t: Tensor) -> Tensor:
    """The same numbers with NaN between them."""
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]


def _of_wider_rows(t: Tensor) -> Tensor:
    """The same numbers as the left part of wider rows, whose right part is NaN."""
    return torch.cat([t, torch.full_like(t, float("nan"))], dim=-1)[..., : t.shape[-1]]


LAYOUTS = pytest.mark.parametrize("layout", [_transposed, _every_second, _of_wider_rows])


@LAYOUTS
@pytest.mark.parametrize(
    "case",
    [Case(T=19, linear=True), Case(T=19, outside_logits=True), Case(T=19, outside_logits=True, top_k=2, mixing="outputs")],
    ids=str,
)
def test_strided_tensors_and_incoming_gradients(
    layout: Callable[[Tensor], Tensor], case: Case, backend: str, exact: torch.dtype, watch
) -> None:
    problem = make_problem(case, exact)
    leaves = {name: layout(t).detach().requires_grad_() for name, t in problem.tensors.items()}
    results = problem.call(backend, **leaves)
    incoming = [layout(problem.dy), layout(problem.dlogits.to(results[1].dtype))]
    gradients = torch.autograd.grad(results, list(leaves.values()), incoming)
    ours = {"y": results[0].detach(), "router_logits": results[1].detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_all_no_worse(problem, ours)


def test_a_sum_of_router_logits_gives_them_an_expanded_gradient(backend: str, exact: torch.dtype, watch) -> None:
    problem = make_problem(Case(T=19), exact)
    problem.dy.zero_()
    problem.dlogits.fill_(1.0)
    leaves = {name: t.clone().requires_grad_() for name, t in problem.tensors.items()}
    _, logits = problem.call(backend, **leaves)
    gradients = torch.autograd.grad(logits.sum(), list(leaves.values()))
    assert_all_no_worse(problem, dict(zip(leaves, gradients, strict=True)))


@LAYOUTS
def test_a_strided_base(layout: Callable[[Tensor], Tensor], backend: str, exact: torch.dtype, watch) -> None:
    t, base = make_problem(Case(), exact).tensors, torch.randn(7, 41, dtype=exact)
    contiguous, strided = (
        lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], base=some, backend=backend)
        for some in (base, layout(base))
    )
    assert torch.equal(strided, contiguous)
