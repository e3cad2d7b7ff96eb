"""Rows as a developer times them, with pytest-benchmark's options: `python -m pytest benchmarks/test_rows.py -k torch`.

`--benchmark-save=before`, then `--benchmark-compare=0001_before` after a change, compares two commits within minutes.
`python -m benchmarks` takes longer, interleaves its rows, and gives the ratios that are published; rows that torch.compile
compiles are measured there alone. Every row is checked before it is timed.
"""

import time
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.measuring.group import call_of
from benchmarks.measuring.timing import FULL
from benchmarks.rows.checks import Checker
from benchmarks.rows.shapes import PHASES, SCOPES, Shape, make_inputs
from benchmarks.rows.steps import NotRun
from benchmarks.rows.table import rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = (
    [Shape(1), Shape(256)] if DEVICE.type == "cpu" else [Shape(t, 4096, 4096, dtype="bfloat16") for t in (16, 512, 8192)]
)


def synchronised() -> float:
    """The host's clock, read when the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def checker(shape: Shape) -> Checker:
    """The rows of one shape share their inputs and their truths."""
    return Checker(make_inputs(shape, DEVICE), FULL.cpu_products)


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("name", [name for name, row in rows().items() if not row.compiled])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row(benchmark: Any, shape: Shape, phase: str, scope: str, name: str) -> None:
    row = rows()[name]
    if scope not in row.scopes:
        pytest.skip(f"{name} has no {scope} of its own")
    if (reason := row.why_not(shape, DEVICE)) is not None:
        pytest.skip(reason)
    try:
        complaint = checker(shape).complaint(row, scope)
    except NotRun as reason:
        pytest.skip(str(reason))
    assert complaint is None, f"no speed for a wrong result: {complaint}"
    inputs = make_inputs(shape, DEVICE)
    benchmark.group = f"{scope}, {phase}: {shape}"
    benchmark(call_of(row.build(inputs, scope), inputs.dy, phase))
