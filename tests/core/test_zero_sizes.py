"""Zero tokens, zero input features, zero output features: results and gradients of every backend."""

import pytest
import torch

from lmoe_kernels import LMoELinear, lmoe
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome

EMPTY = [{"T": 0}, {"I": 0}, {"O": 0}, {"I": 0, "O": 0}, {"T": 0, "O": 0}, {"T": 0, "I": 0}]
KINDS = [
    {"linear": True},
    {"mixing": "outputs", "outside_logits": True},
    {"top_k": 2, "renormalize": False, "shared_a": True},
    {"T": 70, "top_k": 2},
    {"T": 40, "E": 12, "R": 22, "top_k": 1},  # grouped by expert in Triton
]


def _compare(case: Case, dtype: torch.dtype, backend: str) -> None:
    problem = make_problem(case, dtype)
    leaves = leaves_of(problem.tensors)
    ours = outcome(problem, problem.call(backend, **leaves), leaves)
    assert {name: t.dtype for name, t in ours.items() if name in leaves} == {name: t.dtype for name, t in leaves.items()}
    assert_all_no_worse(problem, ours)


@pytest.mark.parametrize("empty", EMPTY, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(dtype: torch.dtype, kind: dict, empty: dict, backend: str, watch) -> None:
    _compare(Case(**kind | empty), dtype, backend)


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_the_reference(empty: dict) -> None:
    _compare(Case(**empty), torch.float64, "reference")


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_every_plan(empty: dict, every_plan: str, watch) -> None:
    _compare(Case(**{"T": 70, "I": 300, "O": 290} | empty), torch.bfloat16, every_plan)


def test_leading_dims_are_kept(backend: str) -> None:
    lora_a, lora_b, gate_weight = torch.randn(3, 2, 0), torch.randn(3, 2, 5), torch.randn(3, 0)
    y, logits = lmoe(
        torch.randn(2, 4, 0), lora_a, lora_b, gate_weight=gate_weight, return_router_logits=True, backend=backend
    )
    assert (y.shape, logits.shape) == ((2, 4, 5), (2, 4, 3))
    assert not y.any()
    assert not logits.any()
    y = lmoe(torch.randn(2, 0, 7), torch.randn(3, 2, 7), lora_b, gate_weight=torch.randn(3, 7), backend=backend)
    assert y.shape == (2, 0, 5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("features", [(0, 5), (7, 0)], ids=str)
def test_a_layer_with_zero_features(features: tuple[int, int]) -> None:
    layer = LMoELinear(*features, num_experts=3, rank=2)
    x = torch.randn(4, features[0], requires_grad=True)
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
