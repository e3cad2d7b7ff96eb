"""fp32 factors next to half-precision tokens: one buffer of copies, cast once, which the backward reads."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_kernels import lmoe
from lmoe_kernels.casting import cast_factors, cast_size, from_buffer
from lmoe_kernels.options import Factors, Saved
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome
from tools import calls

SIZES = {"lora_a": 3 * 5 * 33, "lora_b": 3 * 5 * 7, "gate_weight": 3 * 33}
CAST = ["lora_a", "lora_b", "gate_weight"]


def _factors(a: torch.dtype, b: torch.dtype, gate: torch.dtype | None) -> Factors:
    weight = None if gate is None else torch.randn(3, 33).to(gate)
    logits = torch.randn(4, 3) if gate is None else None
    bias = None if gate is None else torch.randn(3)
    return Factors(torch.randn(3, 5, 33).to(a), torch.randn(3, 5, 7).to(b), weight, bias, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [CAST, ["lora_a"], ["lora_b"], ["gate_weight"], ["lora_a", "gate_weight"]], ids=str)
def test_the_copies_lie_one_after_another_in_one_aligned_buffer(dtype: torch.dtype, given: list[str]) -> None:
    factors = _factors(*(torch.float32 if name in given else dtype for name in CAST))
    cast, buffer = cast_factors(factors, dtype)
    assert buffer is not None
    assert buffer.dtype == dtype
    assert buffer.shape == (sum(-(-SIZES[name] // 64) * 64 for name in given),) == (cast_size(factors, dtype),)
    start = 0
    for name in CAST:
        copy, factor = getattr(cast, name), getattr(factors, name)
        if name not in given:
            assert copy is factor
            continue
        assert copy.storage_offset() == start
        assert start % 64 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy, factor.to(dtype))
        start += -(-SIZES[name] // 64) * 64
    assert cast.gate_bias is factors.gate_bias
    assert cast.gate_logits is factors.gate_logits


def test_nothing_is_cast_where_nothing_need_be() -> None:
    factors = _factors(torch.bfloat16, torch.bfloat16, None)
    assert cast_factors(factors, torch.bfloat16) == (factors, None)
    assert cast_size(factors, torch.bfloat16) == 0
    assert from_buffer(factors, torch.bfloat16, None) is factors


def test_a_factor_may_begin_anywhere_in_its_storage() -> None:
    whole = torch.randn(5 + 3 * 5 * 33)
    factors = _factors(torch.float32, torch.bfloat16, torch.bfloat16)._replace(lora_a=whole[5:].view(3, 5, 33))
    cast, _ = cast_factors(factors, torch.bfloat16)
    assert torch.equal(cast.lora_a, factors.lora_a.bfloat16())
    assert cast.lora_a.data_ptr() % 64 == 0


def test_the_copies_of_a_buffer_are_those_that_were_made() -> None:
    factors = _factors(torch.float32, torch.bfloat16, torch.float32)
    cast, buffer = cast_factors(factors, torch.bfloat16)
    again = from_buffer(factors, torch.bfloat16, buffer)
    for one, other in zip(cast, again, strict=True):
        assert one is other is None or (one.data_ptr() == other.data_ptr() and torch.equal(one, other))


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_all_factors_are_cast_by_one_operation() -> None:
    factors = _factors(torch.float32, torch.float32, torch.float32)
    with _Counted() as counted:
        _, buffer = cast_factors(factors, torch.bfloat16)
    assert [name for name in counted.names if "copy" in name] == ["aten::_foreach_copy_"]
    with _Counted() as counted:
        from_buffer(factors, torch.bfloat16, buffer)
    assert {name for name in counted.names if name not in ("aten::slice.Tensor", "aten::view")} == set(), "views alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cast", [CAST, ["lora_a"], ["lora_b"], ["gate_weight"]], ids=str)
def test_fp32_factors_obey_the_error_rule(every_plan: str, cast: list[str], dtype: torch.dtype, watch) -> None:
    if every_plan == "cuda" and dtype == torch.float64:
        pytest.skip("the cuda backend does not take float64")
    problem = make_problem(Case(T=35, I=40, O=48, E=5, R=3, top_k=2), dtype)
    for name in cast:
        problem.tensors[name] = torch.randn_like(problem.tensors[name], dtype=torch.float32)
    leaves = leaves_of(problem.tensors)
    assert_all_no_worse(problem, outcome(problem, problem.call(every_plan, **leaves), leaves))


@pytest.mark.parametrize("name", CAST)
def test_the_backward_reads_what_the_forward_cast(every_plan: str, name: str) -> None:
    """The parameters are full of NaN after the forward: a backward that reads them shows it."""
    problem = make_problem(Case(T=35, I=40, O=48, E=5, R=3), torch.bfloat16, param_dtype=torch.float32)
    x, factors = problem.tensors["x"], calls.factors_of(problem.tensors)
    _, saved = calls.forward_saved(every_plan, x, factors)
    assert saved.cast is not None
    whole = calls.backward(every_plan, problem.dy, x, factors, saved, dlogits=problem.dlogits)
    getattr(factors, name).fill_(float("nan"))
    poisoned = calls.backward(every_plan, problem.dy, x, factors, saved, dlogits=problem.dlogits)
    for field, one, other in zip(whole._fields, whole, poisoned, strict=True):
        assert one is other is None or torch.equal(one, other), field


def test_a_call_saves_one_buffer_for_all_copies() -> None:
    """Autograd keeps the copies in addition to the parameters themselves: 2 bytes for each of their elements."""
    problem = make_problem(Case(T=35, I=40, O=48, E=5, R=3), torch.bfloat16, param_dtype=torch.float32)
    leaves = leaves_of(problem.tensors)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lmoe(leaves["x"], leaves["lora_a"], leaves["lora_b"], gate_weight=leaves["gate_weight"], backend="torch")
    elements = sum(-(-leaves[name].numel() // 64) * 64 for name in CAST)
    assert [t.nbytes for t in saved if t.dim() == 1] == [2 * elements]
    assert Saved._fields[-1] == "cast"
