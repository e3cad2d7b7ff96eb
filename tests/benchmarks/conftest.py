"""Fixtures of the tests of the benchmarks. No test looks at a time."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from benchmarks import __main__ as cli
from lmoe_kernels import dispatch
from lmoe_kernels.options import Gradients
from tests.benchmarks.small import BRIEF, LIMITS


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The commands set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wrong_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend that computes half the gradient of gate_weight."""

    right = dispatch.load("torch")

    def backward(*args, **kwargs) -> Gradients:
        grads = right.backward(*args, **kwargs)
        return grads._replace(gate_weight=grads.gate_weight / 2)

    for part, function in (("forward", right.forward), ("backward", backward), ("dropout", right.dropout)):
        module = ModuleType(f"wrong_backend.{part}")
        setattr(module, part, function)
        monkeypatch.setitem(sys.modules, f"wrong_backend.{part}", module)
    monkeypatch.setitem(sys.modules, "wrong_backend", ModuleType("wrong_backend"))
    row = dispatch.BACKENDS["torch"]._replace(package="wrong_backend")
    monkeypatch.setitem(dispatch.BACKENDS, "wrong", row)
    dispatch.load.cache_clear()
    yield "wrong"
    dispatch.load.cache_clear()


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the command without measuring the machine's limits, and with two rounds."""
    monkeypatch.setattr(cli, "measure_limits", lambda device, dtypes, quick: LIMITS)
    monkeypatch.setattr(cli, "QUICK", BRIEF)
