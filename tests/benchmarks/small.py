"""A small problem, an effort of milliseconds, and fixed limits of a machine: what the tests of the benchmarks share."""

from collections.abc import Iterable

import torch

from benchmarks.measuring.group import Group, Record
from benchmarks.measuring.limits import Limits
from benchmarks.measuring.timing import Effort
from benchmarks.rows.shapes import DTYPES, Shape
from benchmarks.rows.table import rows

CPU = torch.device("cpu")
SMALL = Shape(tokens=7, in_features=24, out_features=40, num_experts=3, rank=4)
BRIEF = Effort(visits=2, seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=0.0, cpu_products=2**33)
RATES, NARROW_RATES = dict.fromkeys(DTYPES, 1e12), dict.fromkeys(DTYPES, 1e11)
LIMITS = Limits(copy_bytes_per_s=1e9, gemm_flops_per_s=RATES, narrow_flops_per_s=NARROW_RATES, cache_bytes=1)


def records(
    names: Iterable[str], shape: Shape = SMALL, scope: str = "layer", phase: str = "forward+backward"
) -> dict[str, Record]:
    """The record of each row after two visits."""
    table = rows()
    group = Group(shape, scope, [phase], [table[name] for name in names], CPU, LIMITS, BRIEF)
    group.visit()
    group.visit()
    return {record.row: record for record in group.records()}
