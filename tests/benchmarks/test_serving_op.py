"""The benchmark of the stacked op on small layers: what it times, and that a wrong result stops it."""

import pytest
import torch

from benchmarks.measuring.timing import Effort
from benchmarks.serving import op

LEAST = Effort(visits=1, seconds=0.0, min_rounds=1, max_rounds=1, sample_seconds=1e-6, cpu_products=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LAYERS", {"two": (64, (48, 16))})


def test_every_row_has_its_times() -> None:
    with torch.no_grad():
        rows = op.measure("two", 3, CPU, LEAST)
    assert rows.keys() >= {op.FROZEN, op.SEPARATE, "torch"}
    assert all(0 < times["low"] <= times["median"] <= times["high"] for times in rows.values())


def test_a_result_that_is_added_twice_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    add = op.Inputs.stacked

    def twice(self: op.Inputs, backend: str) -> None:
        add(self, backend)
        add(self, backend)

    monkeypatch.setattr(op.Inputs, "stacked", twice)
    with torch.no_grad(), pytest.raises(AssertionError, match="rms error"):
        op.measure("two", 3, CPU, LEAST)
