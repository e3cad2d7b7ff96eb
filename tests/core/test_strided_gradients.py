"""Tensors of any strides, forward and backward: they compute what their contiguous copies compute."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmoe_kernels import lmoe
from tests.problems import Case, assert_all_no_worse, make_problem


def _transposed(t: Tensor) -> Tensor:
    """The same numbers, the last dims stored the other way round."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def _every_second(t: Tensor) -> Tensor:
    """The same numbers with others between them."""
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]


def _of_wider_rows(t: Tensor) -> Tensor:
    """The same numbers, the left part of a matrix whose right part is another's."""
    return torch.cat([t, torch.full_like(t, float("nan"))], dim=-1)[..., : t.shape[-1]]


WAYS = pytest.mark.parametrize("way", [_transposed, _every_second, _of_wider_rows])


@WAYS
@pytest.mark.parametrize(
    "case",
    [Case(T=19, linear=True), Case(T=19, outside_logits=True), Case(T=19, outside_logits=True, top_k=2, mixing="outputs")],
    ids=str,
)
def test_strided_tensors_and_gradients_from_above(
    way: Callable[[Tensor], Tensor], case: Case, backend: str, exact: torch.dtype, watch
) -> None:
    problem = make_problem(case, exact)
    leaves = {name: way(t).detach().requires_grad_() for name, t in problem.tensors.items()}
    results = problem.call(backend, **leaves)
    arriving = [way(problem.dy), way(problem.dlogits.to(results[1].dtype))]
    gradients = torch.autograd.grad(results, list(leaves.values()), arriving)
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


@WAYS
def test_a_strided_base(way: Callable[[Tensor], Tensor], backend: str, exact: torch.dtype, watch) -> None:
    t, base = make_problem(Case(), exact).tensors, torch.randn(7, 41, dtype=exact)
    contiguous, strided = (
        lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], base=some, backend=backend)
        for some in (base, way(base))
    )
    assert torch.equal(strided, contiguous)
