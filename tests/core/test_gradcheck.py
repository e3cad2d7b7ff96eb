"""Numerical differentiation in float64, through the public function, for every tensor that can require a gradient."""

import pytest
import torch

from lmoe_kernels import lmoe
from tests.problems import Case, leaves_of, make_problem


@pytest.mark.parametrize("shared_a", [False, True], ids=["own_a", "shared_a"])
@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_gradcheck_of_gates(mixing: str, shared_a: bool, backend: str, exact: torch.dtype) -> None:
    if exact != torch.float64:
        pytest.skip(f"the {backend} backend does not take float64")
    case = Case(T=3, I=5, O=6, E=4, R=2, mixing=mixing, shared_a=shared_a, outside_logits=True, softmax=False)
    leaves = leaves_of(make_problem(case, torch.float64).tensors)

    def function(x, lora_a, lora_b, gates):
        return lmoe(x, lora_a, lora_b, gates=gates, scaling=1.3, mixing=mixing, backend=backend)

    arguments = tuple(leaves[name] for name in ("x", "lora_a", "lora_b", "gate_logits"))
    assert torch.autograd.gradcheck(function, arguments, fast_mode=backend == "triton")


@pytest.mark.parametrize("outside_logits", [False, True], ids=["gate_weight", "gate_logits"])
@pytest.mark.parametrize("shared_a", [False, True], ids=["own_a", "shared_a"])
@pytest.mark.parametrize(("top_k", "renormalize"), [(None, True), (2, True), (2, False)])
@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_gradcheck(
    mixing: str,
    top_k: int | None,
    renormalize: bool,
    shared_a: bool,
    outside_logits: bool,
    backend: str,
    exact: torch.dtype,
) -> None:
    if exact != torch.float64:
        pytest.skip(f"the {backend} backend does not take float64")
    case = Case(T=4, I=5, O=6, E=4, R=2, mixing=mixing, top_k=top_k, shared_a=shared_a, outside_logits=outside_logits)
    leaves = leaves_of(make_problem(case, torch.float64).tensors)
    gate = "gate_logits" if outside_logits else "gate_weight"

    def function(x, lora_a, lora_b, gate_tensor):
        return lmoe(
            x, lora_a, lora_b, **{gate: gate_tensor}, scaling=1.3, mixing=mixing, top_k=top_k, renormalize=renormalize,
            return_router_logits=True, backend=backend,
        )  # fmt: skip

    fast = backend == "triton"  # the interpreter takes milliseconds a call: check random projections, not every element
    arguments = tuple(leaves[name] for name in ("x", "lora_a", "lora_b", gate))
    assert torch.autograd.gradcheck(function, arguments, fast_mode=fast)
