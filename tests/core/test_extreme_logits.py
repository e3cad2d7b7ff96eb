"""Router logits and given gates that are large, infinite, NaN, 0 or equal, on every plan of every backend, both ways."""

import pytest
import torch

from tests.problems import Case, Problem, assert_all_no_worse, leaves_of, make_problem, outcome

CASES = [
    Case(T=9, outside_logits=True),
    Case(T=9, outside_logits=True, top_k=2, mixing="outputs"),
    Case(T=9, outside_logits=True, top_k=3),
    Case(T=9, outside_logits=True, top_k=2, renormalize=False),
]
GATES = [
    Case(T=9, outside_logits=True, softmax=False),
    Case(T=9, outside_logits=True, softmax=False, mixing="outputs"),
    Case(T=9, outside_logits=True, softmax=False, shared_a=True),
]

# Triton's interpreter also computes the exponentials of padded experts; they are masked afterwards.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def _run(problem: Problem, backend: str) -> dict[str, torch.Tensor]:
    leaves = leaves_of(problem.tensors)
    return outcome(problem, problem.call(backend, **leaves), leaves)


@pytest.mark.parametrize("case", CASES + GATES, ids=str)
def test_large_logits(case: Case, every_plan: str, watch) -> None:
    """exp(logit) overflows; exp(logit - largest logit) does not. Of given gates no exponential is computed."""
    problem = make_problem(case, torch.float32)
    problem.tensors["gate_logits"] += torch.tensor([1000.0, -1000.0, 100.0]).repeat(case.T)[: case.T, None]
    assert_all_no_worse(problem, _run(problem, every_plan))


def test_large_logits_of_the_layers_own_gate(every_plan: str, watch) -> None:
    problem = make_problem(Case(T=9), torch.float32)
    x, gate_weight = problem.tensors["x"], problem.tensors["gate_weight"]
    x.mul_(8).round_().div_(8)[:, 0] = 1.0  # exact logits: one rounding near 512 would be the whole error
    gate_weight.mul_(64).round_().div_(64)[:, 0] = 512.0
    assert_all_no_worse(problem, _run(problem, every_plan))


@pytest.mark.parametrize("case", [*CASES, GATES[0], GATES[2]], ids=str)
def test_a_nan_in_the_logits_of_a_token_affects_that_token_alone(case: Case, every_plan: str) -> None:
    problem = make_problem(case, torch.float32)
    problem.tensors["gate_logits"][2, 1] = float("nan")
    results = _run(problem, every_plan)
    others = torch.arange(case.T) != 2
    for name in ("y", "x"):
        assert results[name][2].isnan().all(), name
        assert results[name][others].isfinite().all(), name
    assert results["gate_logits"][2].isnan().any()
    assert results["gate_logits"][others].isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_expert_masked_by_minus_infinity_counts_as_absent(case: Case, every_plan: str, watch) -> None:
    problem = make_problem(case, torch.float32)
    problem.tensors["gate_logits"][:, 3] = float("-inf")
    results = _run(problem, every_plan)
    for name in ("lora_a", "lora_b"):
        assert (results[name][3] == 0).all(), name
    assert torch.equal(results["gate_logits"][:, 3], problem.dlogits[:, 3])
    kept = [e for e in range(case.E) if e != 3]
    of_kept = {name: results[name][kept] for name in ("lora_a", "lora_b")}
    of_kept["gate_logits"] = results["gate_logits"][:, kept]
    assert_all_no_worse(problem.of_experts(kept), {"y": results["y"], "x": results["x"], **of_kept})


@pytest.mark.parametrize("case", GATES, ids=str)
def test_a_gate_of_0_drops_its_expert(case: Case, every_plan: str, watch) -> None:
    """But not the gradient of the gate, which is that of any other gate."""
    problem = make_problem(case, torch.float32)
    problem.tensors["gate_logits"][:, 3] = 0.0
    results = _run(problem, every_plan)
    for name in ("lora_b",) if case.shared_a else ("lora_a", "lora_b"):
        assert (results[name][3] == 0).all(), name
    assert_all_no_worse(problem, results)


@pytest.mark.parametrize("case", GATES, ids=str)
def test_gates_of_any_sign_whose_sum_is_0(case: Case, every_plan: str, watch) -> None:
    """Under a shared A the delta is 0 then, and so are all gradients but that of the gates."""
    problem = make_problem(case, torch.float32)
    problem.dlogits.zero_()
    problem.tensors["gate_logits"][:] = torch.tensor([1.0, -2.0, 0.5, 0.75, -0.25])
    results = _run(problem, every_plan)
    if case.shared_a:
        for name in ("y", "x", "lora_a", "lora_b"):
            zero = results.pop(name)
            torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-4)
        assert (results["gate_logits"].abs() > 1e-3).any(dim=0).all()
    assert_all_no_worse(problem, results)


@pytest.mark.parametrize("experts", [6, 40], ids=["fewer experts than lanes of a warp", "more experts than lanes"])
def test_of_equal_logits_the_lower_expert_is_kept_forward_and_backward(experts: int, every_plan: str, watch) -> None:
    case = Case(T=9, I=16, O=16, E=experts, R=2, outside_logits=True, top_k=3)
    problem = make_problem(case, torch.float32)
    problem.tensors["gate_logits"].zero_()[:, 4] = 1.0
    results, kept = _run(problem, every_plan), [0, 1, 4]
    dropped = torch.ones(experts).index_fill(0, torch.tensor(kept), 0.0).bool()
    for name in ("lora_a", "lora_b"):
        assert (results[name][dropped] == 0).all(), name
    of_kept = {name: results[name][~dropped] for name in ("lora_a", "lora_b")}
    assert_all_no_worse(problem.of_experts(kept), {"y": results["y"], "x": results["x"], **of_kept})
