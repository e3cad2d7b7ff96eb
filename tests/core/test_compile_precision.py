"""The ops' fakes and compiled results in half precision, with and without fp32 parameters."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_kernels import ops
from tests.problems import Case, leaves_of, make_problem, outcome

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PARAMETERS = pytest.mark.parametrize("of_parameters", [torch.float32, None], ids=["fp32 parameters", "parameters like x"])


class _Checked(TorchDispatchMode):
    """Compares shapes, strides and dtypes of every call of the ops with those of their fakes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (ops.forward, ops.backward):
            torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@PARAMETERS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(linear=True), Case(outside_logits=True, shared_a=True, mixing="outputs")], ids=str)
def test_fakes_have_the_shapes_and_dtypes_of_results(
    case: Case, dtype: torch.dtype, of_parameters: torch.dtype | None
) -> None:
    problem = make_problem(case, dtype, of_parameters)
    leaves = leaves_of(problem.tensors)
    with _Checked() as checked:
        outcome(problem, problem.call("torch", **leaves), leaves)
        with torch.no_grad():
            problem.call("torch")
    assert checked.seen == [ops.forward, ops.backward, ops.forward]


@PARAMETERS
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_half_precision_gives_the_same_bits(compiler: str, of_parameters: torch.dtype | None) -> None:
    torch._dynamo.reset()
    problem = make_problem(Case(T=12, linear=True), torch.bfloat16, of_parameters)
    names = list(problem.tensors)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, logits = problem.call("torch", **dict(zip(names, tensors, strict=True)))
        return y.relu(), logits * 2

    leaves = list(leaves_of(problem.tensors).values())
    dlogits = torch.randn(12, 5)
    eager, compiled = (
        [*results, *torch.autograd.grad(results, leaves, [problem.dy, dlogits])]
        for results in (function(*leaves), torch.compile(function, fullgraph=True, backend=compiler)(*leaves))
    )
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)
