"""The gradients of fp32 parameters with bf16 tokens are exact fp32 sums, on every plan.

In these problems every number that a kernel may round to bf16 is exact in bf16, and every sum is exact in fp32: each token
keeps two experts with gates of one half, each factor selects one feature, tokens and gradients are small integers. Any error
is therefore a rounding that should not happen.
"""

import pytest
import torch

from tests.problems import Case, Problem, leaves_of, make_problem, outcome, truth

CASES = [
    Case(T=70, I=264, O=260, E=2, R=2, scaling=1.0),
    Case(T=70, I=24, O=40, E=2, R=2, mixing="outputs", scaling=0.5, outside_logits=True),
    Case(T=70, I=24, O=40, E=5, R=2, top_k=2, scaling=1.0),
    Case(T=110, I=24, O=40, E=5, R=2, top_k=2, mixing="outputs", scaling=1.0, outside_logits=True),
    Case(T=70, I=24, O=40, E=2, R=2, shared_a=True, scaling=1.0),
    Case(T=110, I=24, O=40, E=5, R=2, shared_a=True, top_k=2, scaling=1.0, outside_logits=True),
]


def _exact_problem(case: Case) -> Problem:
    problem = make_problem(case, torch.bfloat16, param_dtype=torch.float32)
    t = problem.tensors
    t["x"].random_(1, 8 if case.outside_logits else 4)  # with gate_weight the logits' gradient is rounded to bf16 too
    for factor in (t["lora_a"], t["lora_b"]):
        factor.zero_().scatter_(2, torch.randint(factor.shape[2], (*factor.shape[:2], 1)), 1.0)
    if case.outside_logits:  # each token keeps two experts of its own
        kept = torch.rand(case.T, case.E).argsort(dim=1)[:, :2]
        t["gate_logits"] = torch.full((case.T, case.E), -1.0).scatter_(1, kept, 0.0)
    else:
        t["gate_weight"].zero_()
    problem.dy.random_(1, 4)
    problem.dlogits.fill_(16.0)
    return problem


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_fp32_parameters_are_exact_fp32_sums(case: Case, every_plan: str, watch) -> None:
    problem = _exact_problem(case)
    leaves, true = leaves_of(problem.tensors), truth(problem)
    results = outcome(problem, problem.call(every_plan, **leaves), leaves)
    for name in leaves.keys() & {"lora_a", "lora_b", "gate_weight"}:
        assert results[name].dtype == torch.float32
        assert torch.equal(results[name].double(), true[name]), f"{name} was rounded"
        assert not torch.equal(true[name].bfloat16().double(), true[name]), f"{name} would be exact in bf16 too"
