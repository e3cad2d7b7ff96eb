"""A layer's part of a training step, forward and backward, row by row: `python -m pytest benchmarks/bench_layer.py`."""

from typing import Any

import pytest

from benchmarks.baselines import rows
from benchmarks.pytest_rows import SHAPES, measure, synchronised
from benchmarks.shapes import Shape


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("row", rows())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer(benchmark: Any, shape: Shape, row: str) -> None:
    measure(benchmark, shape, row, "layer", "forward+backward")
