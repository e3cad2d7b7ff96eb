"""The forward, row by row, of the layer and of the delta alone: `python -m pytest benchmarks/bench_forward.py`."""

from typing import Any

import pytest

from benchmarks.baselines import rows
from benchmarks.pytest_rows import SHAPES, measure, synchronised
from benchmarks.shapes import SCOPES, Shape


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("row", rows())
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(benchmark: Any, shape: Shape, scope: str, row: str) -> None:
    measure(benchmark, shape, row, scope, "forward")
