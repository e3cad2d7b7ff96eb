"""What the `bench_*.py` files share: their shapes, the clock that waits for the device, and one measured row."""

import time
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.baselines import NotRun, rows
from benchmarks.checks import Checker
from benchmarks.measure import call_of
from benchmarks.shapes import Shape, make_inputs
from benchmarks.timing import FULL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = (
    [Shape(1), Shape(256)] if DEVICE.type == "cpu" else [Shape(t, 4096, 4096, dtype="bfloat16") for t in (16, 512, 8192)]
)


def synchronised() -> float:
    """The host's clock once the device is done: for `pytest.mark.benchmark(timer=...)`."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(benchmark: Any, shape: Shape, name: str, scope: str, phase: str) -> None:
    """Check a row, then time it; rows of one shape and phase are one group of the table."""
    row = rows()[name]
    if scope not in row.scopes:
        pytest.skip(f"{name} has no {scope} of its own")
    if (reason := row.why_not(shape, DEVICE)) is not None:
        pytest.skip(reason)
    inputs = _inputs(shape)
    try:
        complaint = _checker(shape).complaint(row, scope)
    except NotRun as reason:
        pytest.skip(str(reason))
    assert complaint is None, f"no speed for a wrong result: {complaint}"
    benchmark.group = f"{scope}, {phase}: {shape}"
    benchmark(call_of(row.build(inputs, scope), inputs.dy, phase))


@cache
def _inputs(shape: Shape) -> Any:
    return make_inputs(shape, DEVICE)


@cache
def _checker(shape: Shape) -> Checker:
    return Checker(_inputs(shape), FULL.cpu_products)
