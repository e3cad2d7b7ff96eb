"""Several mixtures added to y in place: each backend against the definition in float64, and against plain PyTorch."""

import pytest
import torch
from torch import Tensor

from lmoe_kernels.options import TokenGroups
from tests.serving import ADAPTERS, MIXED, QKV, STACKS, Call, assert_isolated, make_call, of_adapters
from tools.error_rule import assert_no_worse
from tools.far import far_apart
from tools.watch import AllocationWatch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("groups", ["", "int", "with scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_every_backend_adds_what_the_definition_adds(
    name: str, dtype: torch.dtype, groups: str, backend: str, watch: AllocationWatch
) -> None:
    call = make_call(STACKS[name], dtype, tokens=13, groups=groups, outside=name == "one")
    assert_no_worse("y", call.run(backend), call.plain(), call.true())


@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 40, 70])
def test_any_number_of_tokens(tokens: int, backend: str, exact: torch.dtype, watch: AllocationWatch) -> None:
    call = make_call(MIXED, exact, tokens=tokens, features=48)
    assert_no_worse("y", call.run(backend), call.plain(), call.true())


@pytest.mark.parametrize("groups", ["int", ""])
def test_many_adapters(groups: str, backend: str, exact: torch.dtype, watch: AllocationWatch) -> None:
    """Twelve with three modules each; without groups they add to the same columns, one after another."""
    call = make_call(of_adapters(QKV, 12), exact, tokens=12, groups=groups)
    assert_no_worse("y", call.run(backend), call.plain(), call.true())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_reaches_the_tokens_of_its_group_alone(
    value: float, backend: str, exact: torch.dtype, watch: AllocationWatch
) -> None:
    """Nor does a broken token reach others."""
    assert_isolated(value, backend, exact)


def test_tensors_whose_rows_lie_apart(backend: str, exact: torch.dtype) -> None:
    call = make_call(ADAPTERS, exact, tokens=19, groups="with scale", outside=True)
    assert call.groups is not None

    def apart(rows: Tensor | None) -> Tensor:
        assert rows is not None
        return torch.stack((rows, torch.full_like(rows, -1)), dim=-1)[..., 0]  # every second number

    x = torch.nn.functional.pad(call.x, (3, 6), value=float("nan"))[:, 3:-6]
    groups = TokenGroups(apart(call.groups.group), apart(call.groups.scale))
    strided = call._replace(x=x, logits=apart(call.logits), groups=groups)
    assert_no_worse("y", strided.run(backend), call.plain(), call.true())


def test_rows_that_begin_behind_two_to_the_31_elements(backend: str, exact: torch.dtype) -> None:
    call = make_call(MIXED, exact, tokens=4)
    y = far_apart(call.y)
    call._replace(x=far_apart(call.x)).add(y, backend)
    assert_no_worse("y", y, call.plain(), call.true())


def test_large_logits(backend: str, exact: torch.dtype) -> None:
    call = make_call(QKV, exact, tokens=9, outside=True)
    assert call.logits is not None
    call = call._replace(logits=1e30 * call.logits)
    y = call.run(backend)
    assert y.isfinite().all()
    assert_no_worse("y", y, call.plain(), call.true())


def test_the_op_under_torch_compile() -> None:
    call: Call = make_call(QKV, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(y: Tensor, x: Tensor) -> Tensor:
        call.experts.add_(y, x, backend="torch")
        return y * 2

    torch.testing.assert_close(run(call.y.clone(), call.x), 2 * call.run("torch"))
