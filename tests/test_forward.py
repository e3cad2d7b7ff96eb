"""Forward of every backend: float64 truth, odd shapes, strides, repeatability."""

import pytest
import torch

from lmoe_kernels import lmoe
from tests.far import far_apart
from tests.problems import CASES, Case, assert_all_no_worse, make_problem

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
def test_fp32_parameters_beside_half_precision_tokens(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    problem = make_problem(case, dtype, param_dtype=torch.float32)
    y, _ = problem.call(backend)
    assert y.dtype == dtype
    assert_all_no_worse(problem, {"y": y})


def test_any_leading_dims_and_strides(backend: str) -> None:
    problem = make_problem(Case(T=24, I=18, O=10, linear=True), torch.float32)
    expected, expected_logits = problem.call(backend)
    t = problem.tensors
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
        torch.testing.assert_close(y.reshape(24, 10), expected)
        torch.testing.assert_close(logits.reshape(24, 5), expected_logits)
    one_token, _ = problem.call(backend, x=t["x"][3])
    assert one_token.shape == (10,)
    torch.testing.assert_close(one_token, expected[3])


def test_a_token_broadcast_to_a_batch(backend: str) -> None:
    problem = make_problem(Case(T=1), torch.float32)
    y, _ = problem.call(backend, x=problem.tensors["x"].expand(6, -1))
    torch.testing.assert_close(y, problem.call(backend)[0].expand(6, -1))


@pytest.mark.parametrize("tokens", [3, 66], ids=["few tokens", "many tokens"])
def test_rows_past_two_to_the_31_elements(tokens: int, backend: str) -> None:
    t = make_problem(Case(T=tokens, I=24, O=17), torch.bfloat16).tensors
    x, base = t["x"], torch.randn(tokens, 17).bfloat16()
    factors, options = (t["lora_a"], t["lora_b"]), {"gate_weight": t["gate_weight"], "backend": backend}
    assert torch.equal(
        lmoe(far_apart(x), *factors, base=far_apart(base), **options), lmoe(x, *factors, base=base, **options)
    )


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_base_is_added_and_left_alone(lead: tuple[int, ...], backend: str) -> None:
    t = make_problem(Case(), torch.float32).tensors
    x, base = torch.randn(*lead, 33), torch.randn(*lead, 41)
    kept = base.clone()
    y = lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], base=base, backend=backend)
    delta = lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], backend=backend)
    torch.testing.assert_close(y, base + delta)
    assert torch.equal(base, kept)


def test_of_equal_logits_the_lower_expert_is_kept(backend: str) -> None:
    t = make_problem(Case(E=6), torch.float32).tensors
    logits = torch.zeros(7, 6)
    logits[:, 4] = 1.0
    kept = torch.tensor([0, 1, 4])
    y = lmoe(t["x"], t["lora_a"], t["lora_b"], gate_logits=logits, top_k=3, backend=backend)
    expected = lmoe(t["x"], t["lora_a"][kept], t["lora_b"][kept], gate_logits=logits[:, kept], backend=backend)
    torch.testing.assert_close(y, expected)


def test_bitwise_repeatable(backend: str) -> None:
    problem = make_problem(Case(T=130, I=136, O=72, E=8, R=16, linear=True), torch.bfloat16)
    first, second = problem.call(backend), problem.call(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_but_v_is_rounded(backend: str) -> None:
    """With u exact and B picking the first expert, y is gates[0] h, rounded once from fp32."""
    x, lora_a = torch.randint(1, 16, (300, 1)).bfloat16(), torch.tensor([3.0, 7.0, 13.0]).bfloat16().view(3, 1, 1)
    lora_b, logits = torch.tensor([1.0, 0.0, 0.0]).bfloat16().view(3, 1, 1), torch.randn(300, 3)
    y = lmoe(x, lora_a, lora_b, gate_logits=logits, backend=backend)
    gates = logits.softmax(dim=1)
    h = (gates * (x.float() * lora_a.float().view(3))).sum(dim=1)
    once, twice = (gates[:, 0] * h).bfloat16(), (gates[:, 0] * h.bfloat16().float()).bfloat16()
    assert (y[:, 0] == once).float().mean() > 0.97  # the last bit of an exponential may tip a rounding
    assert (y[:, 0] == twice).float().mean() < 0.9
