"""The bytes that the Triton kernels load and store, against the least possible: x and dx once, y once, dy twice."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.options import Factors, Gradients, Options, Wanted
from tests import plans
from tests.problems import Case, Problem, make_problem
from tools import calls
from tools.interpreter.bytes import Access, Bytes, counted, counted_flops, of_tensor, stored_to

CASE = Case(T=96, I=80, O=112, E=4, R=8)


@pytest.fixture(params=["few processors", "many processors"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    plans.force("triton", request.param, monkeypatch)
    return request.param


def test_forward_reads_x_once_and_writes_y_once(plan: str) -> None:
    t = make_problem(CASE, torch.bfloat16).tensors
    with counted() as counts:
        y, _ = calls.forward("triton", t["x"], calls.factors_of(t))
    assert any("one_pass" in access.kernel for access in counts) == (plan == "few processors")
    assert of_tensor(counts, t["x"]).loaded == t["x"].nbytes
    assert stored_to(counts, "y", "out") == y.nbytes


def test_forward_reads_base_once(plan: str) -> None:
    t, base = make_problem(CASE, torch.bfloat16).tensors, torch.randn(CASE.T, CASE.O).bfloat16()
    with counted() as counts:
        calls.forward("triton", t["x"], calls.factors_of(t), base=base, save=False)
    assert of_tensor(counts, base).loaded == base.nbytes
    assert stored_to(counts, "logits") == 0, "nothing is saved"


def test_backward_reads_x_once_and_dy_twice_and_writes_dx_once(plan: str) -> None:
    counts, problem, grads = _backward(CASE)
    assert grads.x is not None
    assert of_tensor(counts, problem.tensors["x"]).loaded == problem.tensors["x"].nbytes
    assert of_tensor(counts, problem.dy).loaded == 2 * problem.dy.nbytes
    assert stored_to(counts, "out") >= grads.x.nbytes
    written = sum(c.stored for a, c in counts.items() if a.kernel == "_expand_fwd_kernel")
    assert written == grads.x.nbytes


@pytest.mark.parametrize("case", [CASE, replace(CASE, T=48, E=9, top_k=1)], ids=["all experts", "in groups"])
def test_backward_reads_dy_then_x_and_writes_dx_last(plan: str, case: Case) -> None:
    """Then dy's second reader finds in the L2 what the first one left there, and the frozen product finds dx."""
    counts, problem, _ = _backward(case)
    names = {problem.dy.data_ptr(): "dy", problem.tensors["x"].data_ptr(): "x"}
    readers = list(dict.fromkeys((names[a.address], a.kernel) for a in counts if a.address in names))
    assert [name for name, _ in readers[:2]] == ["dy", "dy"], "a kernel for dv, then one for dB"
    assert {name for name, _ in readers[2:]} == {"x"}
    assert next(reversed(counts.keys())).kernel.endswith("_expand_fwd_kernel")


@pytest.mark.parametrize("name", ["x", "lora_b", "gate_bias"])
def test_a_gradient_that_is_not_wanted_costs_nothing(plan: str, name: str) -> None:
    counts, problem, grads = _backward(replace(CASE, gate_bias=True), name)
    assert [field for field, grad in grads._asdict().items() if grad is not None] == [name]
    assert of_tensor(counts, problem.tensors["x"]).loaded == 0
    assert of_tensor(counts, problem.dy).loaded == problem.dy.nbytes


def test_the_gate_bias_is_loaded_once_for_each_tile_of_tokens(plan: str) -> None:
    t = make_problem(replace(CASE, gate_bias=True), torch.bfloat16).tensors
    with counted() as counts:
        calls.forward("triton", t["x"], calls.factors_of(t))
    (kernel,) = {access.kernel for access in counts if access.argument == "gate_bias"}
    assert kernel == ("_one_pass_fwd_kernel" if plan == "few processors" else "_shrink_mix_fwd_kernel")
    assert of_tensor(counts, t["gate_bias"]).loaded == 3 * t["gate_bias"].nbytes, "96 tokens are three tiles"


def test_factors_of_many_experts_are_read_again_and_only_then() -> None:
    t = make_problem(replace(CASE, E=12, R=8), torch.bfloat16).tensors  # 96 columns: two tiles of 64 in the interpreter
    with counted() as counts:
        calls.forward("triton", t["x"], calls.factors_of(t))
    assert of_tensor(counts, t["x"]).loaded == 2 * t["x"].nbytes


def test_work_of_few_experts_of_many_grows_with_the_few() -> None:
    flops, loaded = {}, {}
    for E, top_k in ((24, 2), (48, 2)):
        t = make_problem(Case(T=120, I=40, O=48, E=E, R=12, top_k=top_k), torch.bfloat16).tensors
        factors = Factors(t["lora_a"], t["lora_b"], gate_logits=torch.randn(120, E))
        with counted() as counts, counted_flops() as of_kernel:
            y, saved = calls.forward_saved("triton", t["x"], factors, Options(top_k=top_k))
        assert any("grouped" in access.kernel for access in counts)
        loaded[E], flops[E] = of_tensor(counts, t["x"]).loaded, sum(of_kernel.values())
        assert loaded[E] == top_k * t["x"].nbytes
        assert of_tensor(counts, y) == Bytes((top_k - 1) * y.nbytes, top_k * y.nbytes)
        assert of_tensor(counts, saved.u).stored == top_k * saved.u.nbytes // E, "only the experts that are kept are written"
    # every expert's last tile is partly empty: at most one more for each expert and slot
    shrink_and_expand = 2 * 16 * 16 * (64 + 64)  # FLOPs of a tile: 16 tokens, 12 ranks padded to 16, features padded
    assert flops[48] - flops[24] <= 2 * 24 * shrink_and_expand


def _backward(case: Case, *wanted: str) -> tuple[dict[Access, Bytes], Problem, Gradients]:
    """What a backward loads and stores for these gradients, by default for all."""
    problem = make_problem(case, torch.bfloat16)
    x, factors = problem.tensors["x"], calls.factors_of(problem.tensors)
    _, saved = calls.forward_saved("triton", x, factors, case.options)
    named = Wanted(*(name in wanted for name in Wanted._fields)) if wanted else None
    with counted() as counts:
        grads = calls.backward("triton", problem.dy, x, factors, saved, case.options, dlogits=problem.dlogits, wanted=named)
    return counts, problem, grads
