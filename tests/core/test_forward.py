"""Forward of every backend: float64 truth, odd shapes, strides, repeatability."""

import math

import pytest
import torch

from lmoe_kernels import lmoe
from tests.problems import CASES, Case, assert_all_no_worse, make_problem, plain_pytorch, truth
from tools.error_rule import assert_no_worse
from tools.far import far_apart

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_no_worse_than_plain_pytorch(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    problem = make_problem(case, dtype)
    y, logits = problem.call(backend)
    assert y.dtype == dtype
    assert logits.dtype == (dtype if case.outside_logits else torch.promote_types(dtype, torch.float32))
    assert_all_no_worse(problem, {"y": y, "router_logits": logits})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:3] + CASES[5:9], ids=str)
def test_fp32_parameters_with_half_precision_tokens(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    problem = make_problem(case, dtype, param_dtype=torch.float32)
    y, _ = problem.call(backend)
    assert y.dtype == dtype
    assert_all_no_worse(problem, {"y": y})


def test_any_leading_dims_and_strides(backend: str) -> None:
    problem = make_problem(Case(T=24, I=18, O=10, linear=True), torch.float32)
    t, true, plain = problem.tensors, truth(problem), list(plain_pytorch(problem))
    folded = problem.call(backend, x=t["x"].view(2, 3, 4, 18))
    assert folded[0].shape == (2, 3, 4, 10)
    assert folded[1].shape == (2, 3, 4, 5)
    strided = {
        "x": t["x"].t().contiguous().t(),
        "lora_a": t["lora_a"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "lora_b": torch.stack([t["lora_b"], t["lora_b"]], dim=-1)[..., 0],
        "gate_weight": t["gate_weight"].t().contiguous().t(),
        "weight": t["weight"].t().contiguous().t(),
        "bias": torch.stack([t["bias"], t["bias"]], dim=-1)[..., 0],
    }
    for y, logits in (folded, problem.call(backend, **strided)):
        for name, result in {"y": y.reshape(24, 10), "router_logits": logits.reshape(24, 5)}.items():
            assert_no_worse(name, result, [results[name] for results in plain], true[name])
    one_token, _ = problem.call(backend, x=t["x"][3])
    assert one_token.shape == (10,)
    assert_no_worse("y", one_token, [results["y"][3] for results in plain], true["y"][3])


def test_a_token_broadcast_to_a_batch(backend: str) -> None:
    problem = make_problem(Case(T=6), torch.float32)
    problem.tensors["x"] = problem.tensors["x"][:1].expand(6, -1)
    assert_all_no_worse(problem, {"y": problem.call(backend)[0]})


@pytest.mark.parametrize("tokens", [3, 66], ids=["few tokens", "many tokens"])
def test_rows_past_two_to_the_31_elements(tokens: int, backend: str) -> None:
    t = make_problem(Case(T=tokens, I=24, O=17), torch.bfloat16).tensors
    x, base = t["x"], torch.randn(tokens, 17).bfloat16()
    factors, options = (t["lora_a"], t["lora_b"]), {"gate_weight": t["gate_weight"], "backend": backend}
    assert torch.equal(
        lmoe(far_apart(x), *factors, base=far_apart(base), **options), lmoe(x, *factors, base=base, **options)
    )


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_base_is_added_and_not_changed(lead: tuple[int, ...], backend: str) -> None:
    problem = make_problem(Case(T=math.prod(lead)), torch.float32)
    t, base = problem.tensors, torch.randn(*lead, 41)
    x, kept, options = (
        t["x"].view(*lead, 33),
        base.clone(),
        {"gate_weight": t["gate_weight"], "scaling": problem.case.scaling},
    )
    y = lmoe(x, t["lora_a"], t["lora_b"], **options, base=base, backend=backend)
    assert y.shape == base.shape
    plain = [base + results["y"].view_as(base) for results in plain_pytorch(problem)]
    assert_no_worse("y", y, plain, base.double() + truth(problem)["y"].view_as(base))
    assert torch.equal(base, kept)


def test_of_equal_logits_the_lower_expert_is_kept(backend: str) -> None:
    problem = make_problem(Case(E=6, outside_logits=True, scaling=1.0), torch.float32)
    t, logits = problem.tensors, torch.zeros(7, 6)
    logits[:, 4] = 1.0
    y = lmoe(t["x"], t["lora_a"], t["lora_b"], gate_logits=logits, top_k=3, backend=backend)
    t["gate_logits"] = logits
    assert_all_no_worse(problem.of_experts([0, 1, 4]), {"y": y})


def test_bitwise_repeatable(backend: str) -> None:
    problem = make_problem(Case(T=130, I=136, O=72, E=8, R=16, linear=True), torch.bfloat16)
    first, second = problem.call(backend), problem.call(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_but_v_is_rounded(backend: str) -> None:
    """u is exact and B selects the first expert, so that y is gates[0] * h, rounded once from fp32."""
    x, lora_a = torch.randint(1, 16, (300, 1)).bfloat16(), torch.tensor([3.0, 7.0, 13.0]).bfloat16().view(3, 1, 1)
    lora_b, logits = torch.tensor([1.0, 0.0, 0.0]).bfloat16().view(3, 1, 1), torch.randn(300, 3)
    y = lmoe(x, lora_a, lora_b, gate_logits=logits, backend=backend)
    gates = logits.softmax(dim=1)
    h = (gates * (x.float() * lora_a.float().view(3))).sum(dim=1)
    once, twice = (gates[:, 0] * h).bfloat16(), (gates[:, 0] * h.bfloat16().float()).bfloat16()
    assert (y[:, 0] == once).float().mean() > 0.97  # the last bit of an exponential may change a rounding
    assert (y[:, 0] == twice).float().mean() < 0.9
