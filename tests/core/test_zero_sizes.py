"""Zero tokens, zero input features, zero output features: results and gradients of every backend."""

from importlib import import_module
from importlib.util import find_spec

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
    {"T": 40, "E": 12, "R": 6, "top_k": 1},  # grouped by expert in Triton
]


def _compare(case: Case, dtype: torch.dtype, backend: str) -> None:
    problem = make_problem(case, dtype)
    leaves = leaves_of(problem.tensors)
    ours = outcome(problem, problem.call(backend, **leaves), leaves)
    assert {name: t.dtype for name, t in ours.items() if name in leaves} == {name: t.dtype for name, t in leaves.items()}
    assert_all_no_worse(problem, ours)


@pytest.mark.parametrize("empty", EMPTY, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_forward_and_backward(kind: dict, empty: dict, backend: str, watch) -> None:
    _compare(Case(**kind | empty), torch.float32, backend)


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_the_reference(empty: dict) -> None:
    _compare(Case(**empty), torch.float64, "reference")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("empty", EMPTY, ids=str)
@pytest.mark.parametrize("processors", [1, 64], ids=["few processors", "many processors"])
def test_every_plan_of_triton(processors: int, empty: dict, monkeypatch: pytest.MonkeyPatch, watch) -> None:
    from lmoe_kernels.backends.triton.configs import Chip

    for name in ("forward", "backward"):
        module = import_module(f"lmoe_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "chip_of", lambda device: Chip("interpreter", processors, 1 << 16))
    _compare(Case(**{"T": 70, "I": 300, "O": 290} | empty), torch.bfloat16, "triton")


@pytest.mark.parametrize("empty", EMPTY, ids=str)
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "shrink in parts"])
def test_every_way_of_cuda(one_pass: bool, empty: dict, emulated_cuda, monkeypatch: pytest.MonkeyPatch, watch) -> None:
    forward, backward = (import_module(f"lmoe_kernels.backends.cuda.{name}") for name in ("forward", "backward"))
    plan = forward.one_pass_smem
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: None)
    monkeypatch.setattr(forward, "one_pass_smem", lambda *sizes: plan(*sizes[:-1], 1 if one_pass else 1 << 20))
    for module in (forward, backward):
        monkeypatch.setattr(module, "shrink_parts", lambda *sizes: 1 if one_pass else 3)
    _compare(Case(**{"T": 70} | empty), torch.float32, "cuda")


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
def test_a_layer(features: tuple[int, int]) -> None:
    layer = LMoELinear(*features, num_experts=3, rank=2)
    x = torch.randn(4, features[0], requires_grad=True)
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        assert p.requires_grad == (p.grad is not None), name
