"""The bytes that the Triton kernels ask for, beside the floor: x and dx once, y once, dy twice."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton.configs import Chip
from tests.problems import Case, make_problem
from tools.interpreter.bytes import Bytes, counted, counted_flops, of_tensor, stored_to

FORWARD, BACKWARD = (import_module(f"lmoe_kernels.backends.triton.{name}") for name in ("forward", "backward"))
CASE = Case(T=96, I=80, O=112, E=4, R=8)


@pytest.fixture(params=[1, 64], ids=["one pass", "split"])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    chip = Chip("interpreter", request.param, 1 << 16)
    for module in (FORWARD, BACKWARD):
        monkeypatch.setattr(module, "chip_of", lambda device: chip)
    return request.param


def test_forward_reads_x_once_and_writes_y_once(processors: int) -> None:
    t = make_problem(CASE, torch.bfloat16).tensors
    with counted() as counts:
        y, _, _ = FORWARD.forward(
            t["x"], t["lora_a"], t["lora_b"], t["gate_weight"], None, None, 1.0, "factors", None, True, True
        )
    assert any("one_pass" in access.kernel for access in counts) == (processors == 1)
    assert of_tensor(counts, t["x"]).loaded == t["x"].nbytes
    assert stored_to(counts, "y", "out") == y.nbytes


def test_forward_reads_base_once(processors: int) -> None:
    t, base = make_problem(CASE, torch.bfloat16).tensors, torch.randn(CASE.T, CASE.O).bfloat16()
    with counted() as counts:
        FORWARD.forward(t["x"], t["lora_a"], t["lora_b"], t["gate_weight"], None, base, 1.0, "factors", None, True, False)
    assert of_tensor(counts, base).loaded == base.nbytes
    assert stored_to(counts, "logits") == 0, "nobody asked for the logits"


def test_backward_reads_x_once_and_dy_twice_and_writes_dx_once(processors: int) -> None:
    counts, problem, dx = _backward(CASE, (True,) * 4)
    assert of_tensor(counts, problem.tensors["x"]).loaded == problem.tensors["x"].nbytes
    assert of_tensor(counts, problem.dy).loaded == 2 * problem.dy.nbytes
    assert stored_to(counts, "out") >= dx.nbytes
    written = sum(c.stored for a, c in counts.items() if a.kernel == "_expand_fwd_kernel")
    assert written == dx.nbytes


@pytest.mark.parametrize("case", [CASE, replace(CASE, T=48, E=9, top_k=1)], ids=["all experts", "in groups"])
def test_backward_is_done_with_dy_before_it_turns_to_x_and_writes_dx_last(processors: int, case: Case) -> None:
    """So that dy's second reader finds in the L2 what the first one left, and the frozen product so finds dx."""
    counts, problem, _ = _backward(case, (True,) * 4)
    names = {problem.dy.data_ptr(): "dy", problem.tensors["x"].data_ptr(): "x"}
    readers = list(dict.fromkeys((names[a.address], a.kernel) for a in counts if a.address in names))
    assert [name for name, _ in readers[:2]] == ["dy", "dy"], "a kernel for dv, then one for dB"
    assert {name for name, _ in readers[2:]} == {"x"}
    assert next(reversed(counts.keys())).kernel.endswith("_expand_fwd_kernel")


@pytest.mark.parametrize("mask", [(True, False, False, False), (False, False, True, False)], ids=["dx", "dlora_b"])
def test_a_gradient_nobody_asked_for_costs_nothing(processors: int, mask: tuple[bool, ...]) -> None:
    counts, problem, _ = _backward(CASE, mask)
    assert of_tensor(counts, problem.tensors["x"]).loaded == 0
    assert of_tensor(counts, problem.dy).loaded == problem.dy.nbytes


def test_factors_of_many_experts_are_read_again_and_only_then() -> None:
    t = make_problem(replace(CASE, E=12, R=8), torch.bfloat16).tensors  # 96 columns: two tiles of 64 in the interpreter
    with counted() as counts:
        FORWARD.forward(t["x"], t["lora_a"], t["lora_b"], t["gate_weight"], None, None, 1.0, "factors", None, True, True)
    assert of_tensor(counts, t["x"]).loaded == 2 * t["x"].nbytes


def test_work_of_few_experts_of_many_grows_with_the_few() -> None:
    flops, loaded = {}, {}
    for E, top_k in ((24, 2), (48, 2)):
        t = make_problem(Case(T=120, I=40, O=48, E=E, R=4, top_k=top_k), torch.bfloat16).tensors
        arguments = t["x"], t["lora_a"], t["lora_b"], None, torch.randn(120, E), None, 1.0, "factors", top_k, True, True
        with counted() as counts, counted_flops() as of_kernel:
            y, _, u = FORWARD.forward(*arguments)
        assert any("grouped" in access.kernel for access in counts)
        loaded[E], flops[E] = of_tensor(counts, t["x"]).loaded, sum(of_kernel.values())
        assert loaded[E] == top_k * t["x"].nbytes
        assert of_tensor(counts, y) == Bytes((top_k - 1) * y.nbytes, top_k * y.nbytes)
        assert of_tensor(counts, u).stored == top_k * u.nbytes // E, "only the experts kept are written"
    # every expert's last tile is partly empty: at most one more for each expert and slot
    shrink_and_expand = 2 * 16 * 16 * (64 + 64)  # FLOPs of a tile: 16 tokens, 4 ranks padded to 16, features padded
    assert flops[48] - flops[24] <= 2 * 24 * shrink_and_expand


def _backward(case: Case, mask: tuple[bool, ...]):
    problem = make_problem(case, torch.bfloat16)
    t = problem.tensors
    _, logits, u = FORWARD.forward(
        t["x"], t["lora_a"], t["lora_b"], t["gate_weight"], None, None, 1.0, "factors", case.top_k, True, True
    )
    with counted() as counts:
        dx, _, _, _ = BACKWARD.backward(
            problem.dy,
            problem.dlogits,
            t["x"],
            t["lora_a"],
            t["lora_b"],
            t["gate_weight"],
            logits,
            u,
            1.0,
            "factors",
            case.top_k,
            True,
            mask,
        )
    return counts, problem, dx
