"""Stacks of projections on a GPU, on every backend that computes them: the rule for errors against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmoe_kernels import stack
from tests.core.test_stack import CASES, STACKING, assert_stack_no_worse, make_stack, projections, run
from tests.problems import Case, Problem, eager, leaves_of, make_problem
from tools.error_rule import assert_no_worse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LARGE = [
    Case(T=8192, I=4096, E=8, R=16),
    Case(T=2048, I=1024, E=32, R=16, top_k=2),
    Case(T=300, I=1000, E=5, R=3, gate_bias=True, mixing="outputs"),
]


def on_the_gpu(problems: list[Problem]) -> list[Problem]:
    for problem in problems:
        problem.tensors = {name: t.to(DEVICE) for name, t in problem.tensors.items()}
        problem.dy, problem.dlogits = problem.dy.to(DEVICE), problem.dlogits.to(DEVICE)
    return problems


@pytest.mark.parametrize("name", STACKING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stack_is_no_worse_than_plain_pytorch(
    case: Case, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = on_the_gpu(make_stack(case, dtype))
    assert_stack_no_worse(problems, run(problems, name, monkeypatch))


@pytest.mark.parametrize("name", STACKING)
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_stacks(case: Case, param_dtype: torch.dtype, name: str) -> None:
    """As q, k and v of a model with fewer heads for k and v; against separate calls and the factored form in float64."""
    features = (case.I, case.I // 4, case.I // 4)
    problems = [make_problem(replace(case, O=o, linear=True), torch.bfloat16, param_dtype, DEVICE) for o in features]
    for i, other in enumerate(problems[1:], 1):
        for shared in {"x", "gate_weight", "gate_bias"} & other.tensors.keys():
            t = problems[0].tensors[shared]
            other.tensors[shared] = t if shared == "x" else t.roll(i, 0)
    leaves = [leaves_of(problem.tensors) for problem in problems]
    x, options = leaves[0]["x"], case.options
    parts = projections(leaves)
    assert stack.backend_of(x, parts, name) == name
    results = stack.apply(x, parts, options, backend=name, return_logits=True)
    ours = _outcomes(problems, leaves, results)
    separate = _outcomes(problems, leaves, [p.call(name, **own | {"x": x}) for p, own in zip(problems, leaves, strict=True)])
    exact = [leaves_of(problem.tensors, torch.float64) for problem in problems]
    true = _outcomes(problems, exact, [eager(p, own | {"x": exact[0]["x"]}) for p, own in zip(problems, exact, strict=True)])
    plain = _outcomes(problems, leaves, [eager(p, own | {"x": x}) for p, own in zip(problems, leaves, strict=True)])
    for key, result in ours.items():
        assert_no_worse(key, result, [separate[key], plain[key]], true[key])


def _outcomes(
    problems: list[Problem], leaves: list[dict[str, Tensor]], results: list[tuple[Tensor, Tensor | None]]
) -> dict[str, Tensor]:
    """y, logits and gradients, those of x over all projections."""
    x, found = leaves[0]["x"], {}
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for i, (problem, (y, logits)) in enumerate(zip(problems, results, strict=True)):
        assert logits is not None
        found |= {f"y of {i}": y.detach(), f"router_logits of {i}": logits.detach()}
        loss = loss + (y * problem.dy.to(y.dtype)).sum() + (logits * problem.dlogits.to(logits.dtype)).sum()
    named = [(i, name) for i, own in enumerate(leaves) for name in own if name != "x"]
    of_x, *others = torch.autograd.grad(loss, [x, *(leaves[i][name] for i, name in named)])
    return found | {"x": of_x} | {f"{name} of {i}": t for (i, name), t in zip(named, others, strict=True)}
