"""Stacks of projections that read the same x, on every backend that computes them: the rule for errors against float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmoe_kernels import dispatch, lmoe_linear, stack
from lmoe_kernels.stack import Projection
from tests.problems import SHAPES, Case, Problem, leaves_of, make_problem, plain_pytorch, truth
from tools.error_rule import assert_no_worse

STACKING = [name for name in dispatch.BACKENDS if dispatch.load_stack(name) is not None]
FEATURES = (41, 24, 35)  # O of the projections
CASES = [
    Case(T=40),
    Case(T=1, E=12, R=9),
    Case(T=64, I=70, E=8, R=4, mixing="outputs"),
    Case(E=1, R=1),
    Case(T=40, I=50, E=6, top_k=2),
    Case(T=40, I=16, E=6, R=9, top_k=2, renormalize=False),
    Case(T=40, E=4, top_k=1, renormalize=False, mixing="outputs"),
    Case(T=40, gate_bias=True, top_k=3),
    Case(T=40, outside_logits=True, top_k=2),
]


def make_stack(case: Case, dtype: torch.dtype, param_dtype: torch.dtype | None = None) -> list[Problem]:
    """Problems with the same x and other features; the gates choose other experts, and as clearly as the first one."""
    first, *others = (make_problem(replace(case, O=o, linear=True), dtype, param_dtype) for o in FEATURES)
    for i, other in enumerate(others, 1):
        for name in ("x", "gate_weight", "gate_bias", "gate_logits"):
            if name in first.tensors:
                dim = SHAPES[name].find("E")
                t = first.tensors[name]
                other.tensors[name] = t if dim < 0 else t.roll(i, dim)
    return [first, *others]


def projections(stacked: list[dict[str, Tensor]]) -> list[Projection]:
    return [Projection(*(tensors.get(name) for name in Projection._fields)) for tensors in stacked]


def applied(
    case: Case, backend: str, *, return_logits: bool = True
) -> tuple[list[Problem], list[dict[str, Tensor]], list[tuple[Tensor, Tensor | None]]]:
    """A stack of problems in fp64, its leaves, of which the first x is that of all, and the results of a backend."""
    problems = make_stack(case, torch.float64)
    leaves = [leaves_of(problem.tensors) for problem in problems]
    options = problems[0].case.options
    return (
        problems,
        leaves,
        stack.apply(leaves[0]["x"], projections(leaves), options, backend=backend, return_logits=return_logits),
    )


def run(problems: list[Problem], backend: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """y, router_logits and gradients of each projection, by name; the gradient of x is the sum, with the first one."""
    leaves = [leaves_of(problem.tensors) for problem in problems]
    x = leaves[0]["x"]
    if backend != "separate":
        monkeypatch.setattr(stack, "_pays", lambda x, stack: True)
        parts, options = projections(leaves), problems[0].case.options
        assert stack.backend_of(x, parts, backend) == backend
        results = stack.apply(x, parts, options, backend=backend, return_logits=True)
        results = [(y, own["gate_logits"] if z is None else z) for (y, z), own in zip(results, leaves, strict=True)]
    else:
        results = [problem.call("torch", **own | {"x": x}) for problem, own in zip(problems, leaves, strict=True)]
    loss = sum(
        (y * p.dy.to(y.dtype)).sum() + (z * p.dlogits.to(z.dtype)).sum() for (y, z), p in zip(results, problems, strict=True)
    )
    named = [(i, name) for i, own in enumerate(leaves) for name in own if name != "x" or i == 0]
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, [leaves[i][name] for i, name in named])
    found = [{"y": y.detach(), "router_logits": z.detach()} for y, z in results]
    for (i, name), gradient in zip(named, gradients, strict=True):
        assert gradient.dtype == leaves[i][name].dtype
        found[i][name] = gradient
    return found


def with_common_x(results: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Results of separate problems with the gradient of the common x in the first one."""
    common = torch.stack([result["x"] for result in results]).sum(dim=0)
    return [{**results[0], "x": common}, *({k: t for k, t in other.items() if k != "x"} for other in results[1:])]


def assert_stack_no_worse(problems: list[Problem], ours: list[dict[str, Tensor]]) -> None:
    true = with_common_x([truth(problem) for problem in problems])
    plain = [with_common_x(list(of_all)) for of_all in zip(*map(plain_pytorch, problems), strict=True)]
    for i, own in enumerate(ours):
        for name, result in own.items():
            assert_no_worse(f"{name} of {i}", result, [other[i][name] for other in plain], true[i][name])


@pytest.mark.parametrize("name", STACKING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_stack_is_no_worse_than_plain_pytorch(
    case: Case, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch, watch
) -> None:
    problems = make_stack(case, dtype)
    assert_stack_no_worse(problems, run(problems, name, monkeypatch))


@pytest.mark.parametrize("name", STACKING)
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[8]], ids=str)
def test_fp32_parameters_get_unrounded_gradients(case: Case, name: str, monkeypatch: pytest.MonkeyPatch, watch) -> None:
    problems = make_stack(case, torch.bfloat16, param_dtype=torch.float32)
    ours = run(problems, name, monkeypatch)
    assert_stack_no_worse(problems, ours)
    for own in ours:
        for factor in {"lora_a", "lora_b", "gate_weight"} & own.keys():
            assert not torch.equal(own[factor], own[factor].bfloat16().float()), f"{factor} was rounded"


@pytest.mark.parametrize("name", STACKING)
def test_strided_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = make_stack(CASES[7], torch.float64)
    want = run(problems, name, monkeypatch)
    for problem in problems:
        for key, t in problem.tensors.items():
            problem.tensors[key] = torch.stack([t, t], dim=-1)[..., 0]
        problem.dy = problem.dy.t().contiguous().t()
    for own, other in zip(run(problems, name, monkeypatch), want, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", STACKING)
@pytest.mark.parametrize("unused", [0, 2])
def test_a_projection_that_the_loss_does_not_use_has_no_gradient(unused: int, name: str) -> None:
    problems, leaves, results = applied(Case(T=700), name)
    x = leaves[0]["x"]
    used = [i for i in range(3) if i != unused]
    separate = [problems[i].call(name, **leaves[i] | {"x": x}) for i in used]
    ours = sum(results[i][0].square().sum() for i in used)
    wanted = sum(y.square().sum() for y, _ in separate)
    tensors = [x, *(t for i in used for key, t in leaves[i].items() if key != "x")]
    assert isinstance(ours, Tensor)
    assert isinstance(wanted, Tensor)
    of_unused = [t for key, t in leaves[unused].items() if key != "x"]
    gradients = torch.autograd.grad(ours, [*tensors, *of_unused], allow_unused=True)
    torch.testing.assert_close(gradients[: len(tensors)], torch.autograd.grad(wanted, tensors))
    assert gradients[len(tensors) :] == (None,) * len(of_unused)


@pytest.mark.parametrize("name", STACKING)
def test_a_loss_on_the_logits_alone(name: str) -> None:
    problems, leaves, results = applied(Case(T=700), name)
    x = leaves[0]["x"]
    logits = results[1][1]
    assert logits is not None
    tensors = [x, leaves[1]["gate_weight"]]
    _, wanted = problems[1].call(name, **leaves[1] | {"x": x})
    torch.testing.assert_close(
        torch.autograd.grad(logits.square().sum(), tensors), torch.autograd.grad(wanted.square().sum(), tensors)
    )


@pytest.mark.parametrize("name", STACKING)
@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "gate_weight", "gate_bias", "weight", "bias"])
def test_one_tensor_that_wants_a_gradient(trained: str, name: str) -> None:
    """The tensor is one of the second projection; nothing else is computed or kept for the others."""
    problems = make_stack(Case(T=700, gate_bias=True), torch.float64)
    tensors = [dict(problem.tensors) for problem in problems]
    leaf = tensors[1][trained].clone().requires_grad_()
    tensors[1][trained] = leaf
    x = leaf if trained == "x" else tensors[0]["x"]
    results = stack.apply(x, projections(tensors), problems[0].case.options, backend=name, return_logits=True)
    changed = [0, 1, 2] if trained == "x" else [1]
    wanted = [problems[i].call(name, **tensors[i] | {"x": x}) for i in changed]
    loss = sum((y.square().sum() + z.square().sum()) for y, z in (results[i] for i in changed) if z is not None)
    of_separate = sum(y.square().sum() + z.square().sum() for y, z in wanted)
    assert isinstance(loss, Tensor)
    assert isinstance(of_separate, Tensor)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(of_separate, leaf))


class _OwnTensor(Tensor):
    pass


def test_what_is_no_stack() -> None:
    """One projection, no tokens, few tokens, other sizes, dtypes and devices, tracers, and backends without stacks."""
    problems = make_stack(Case(T=700), torch.float64)
    parts = projections([problem.tensors for problem in problems])
    x = problems[0].tensors["x"]
    assert stack.backend_of(x, parts, "torch") == "torch"

    def changed(**tensors: Any) -> list[Projection]:
        return [parts[0], parts[1]._replace(**tensors), parts[2]]

    one = parts[1]
    for other in (
        parts[:1],
        changed(lora_a=one.lora_a[:, :2], lora_b=one.lora_b[:, :2]),
        changed(lora_a=one.lora_a[:1]),
        changed(lora_b=one.lora_b[:0]),
        changed(lora_b=one.lora_b.float()),
        changed(gate_weight=None),
        changed(weight=torch.empty(0, dtype=x.dtype)),
        changed(weight=one.weight.to("meta")),
        changed(bias=one.weight[0].float()),
        changed(lora_a=one.lora_a.as_subclass(_OwnTensor)),
    ):
        assert stack.backend_of(x, other, "torch") is None
    assert stack.backend_of(x[:0], parts, "torch") is None
    assert stack.backend_of(x[:4], parts, "torch") is None
    assert stack.backend_of(x, parts, "reference") is None
    with torch.device("cpu"):  # a mode
        assert stack.backend_of(x, parts, "torch") is None


def test_few_tokens_are_a_stack_where_the_factors_are_cast_anyway() -> None:
    problems = make_stack(Case(T=2), torch.bfloat16, param_dtype=torch.float32)
    parts = projections([problem.tensors for problem in problems])
    assert stack.backend_of(problems[0].tensors["x"], parts, "torch") == "torch"


def test_no_second_derivatives() -> None:
    _, leaves, ((y, _), *_) = applied(Case(T=9), "torch", return_logits=False)
    with pytest.raises(RuntimeError, match="create_graph must be False, got True: there are no second derivatives"):
        torch.autograd.grad(y.sum(), leaves[0]["x"], create_graph=True)


@pytest.mark.parametrize("name", STACKING)
def test_results_can_be_changed_in_place(name: str) -> None:
    problems, _, results = applied(Case(T=9), name)
    for y, logits in results:
        y.mul_(2)
        assert logits is not None
        logits.mul_(2)
    one = problems[0].tensors
    want = lmoe_linear(
        one["x"], one["weight"], one["bias"], one["lora_a"], one["lora_b"], gate_weight=one["gate_weight"], scaling=0.75
    )
    torch.testing.assert_close(results[0][0].detach(), 2 * want)
    sum(y.sum() for y, _ in results).backward()  # pyright: ignore[reportAttributeAccessIssue]
