"""Tensors that lie on a multiple of their element's size but not of 16 bytes: every path gives the same bits."""

import pytest
import torch

from lmoe_kernels.options import Gradients
from tests import plans
from tests.problems import Case, make_problem
from tests.tensors import off_by_an_element
from tools import calls

PATHS = ["decode", "one pass", "stages", "parts"]


@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("outside", [False, True], ids=["gate", "outside logits"])
def test_views_of_larger_buffers(outside: bool, path: str, param_dtype, emulated_cuda, monkeypatch, watch) -> None:
    """One tensor is moved at a time, so that a wrong address of it is not hidden by another's."""
    plans.force("cuda", path, monkeypatch)
    T = 5 if path == "decode" else 33
    case = Case(T=T, I=136, O=144, E=3, R=8, outside_logits=outside, gate_bias=not outside)
    problem = make_problem(case, torch.bfloat16, param_dtype=param_dtype)
    given = problem.tensors | {"dy": problem.dy, "dlogits": problem.dlogits, "base": torch.randn(T, 144).bfloat16()}
    expected = _results(case, given)
    for name, tensor in given.items():
        moved = _results(case, given | {name: off_by_an_element(tensor)})
        different = [key for key, value in moved.items() if not torch.equal(value, expected[key])]
        assert not different, f"{name} changes {different}"


def _results(case: Case, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    factors = calls.factors_of(t)
    unsaved, _ = calls.forward("cuda", t["x"], factors, case.options, base=t["base"], save=False)
    y, saved = calls.forward_saved("cuda", t["x"], factors, case.options, base=t["base"])
    gradients = calls.backward("cuda", t["dy"], t["x"], factors, saved, case.options, dlogits=t["dlogits"])
    named = zip(Gradients._fields, gradients, strict=True)
    return {"y": y, "y unsaved": unsaved, **{name: gradient for name, gradient in named if gradient is not None}}
