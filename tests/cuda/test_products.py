"""Sizes at the edges of a product's tiles, steps and buffers, whose addresses are made in different ways.

C are the columns of u and the logits, whose factors lie in two buffers: those of A come first. Steps have 64 elements in 16
bits and 32 in fp32, tiles 128 rows and 64, 128 or 144 columns, of which the last 16 of 144 are copied apart.
"""

import pytest
import torch

from lmoe_kernels.options import Gradients
from tests import plans
from tests.problems import Case, assert_all_no_worse, make_problem
from tools import calls

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EDGES = [
    (Case(T=1, I=64, O=63, E=4, R=15), BF16, "stages"),  # C = 64
    (Case(T=127, I=72, O=65, E=5, R=12), FP16, "one pass"),  # C = 65
    (Case(T=128, I=128, O=127, E=8, R=15), BF16, "parts"),  # C = 128
    (Case(T=129, I=63, O=128, E=3, R=42), BF16, "one pass"),  # C = 129, the second buffer begins in a thread's copies
    (Case(T=3, I=136, O=129, E=8, R=16), FP16, "one pass"),  # C = 136, the second buffer is the rest
    (Case(T=20, I=65, O=72, E=9, R=15), BF16, "parts"),  # C = 144, the second buffer begins in the rest
    (Case(T=9, I=40, O=136, E=5, R=28), BF16, "stages"),  # C = 145, two tiles of 128
    (Case(T=2, I=31, O=33, E=10, R=14), FP32, "stages"),  # C = 150
    (Case(T=65, I=24, O=16, E=16, R=16), BF16, "parts"),  # C = 272, two tiles of 144
    (Case(T=5, I=16, O=24, E=12, R=24), FP16, "stages"),  # C = 300, three tiles of 128
    (Case(T=64, I=257, O=264, E=6, R=10, shared_a=True), BF16, "one pass"),  # a sweep over three tiles of features
    (Case(T=4, I=8, O=257, E=8, R=16, shared_a=True, top_k=2), FP16, "one pass"),  # over two steps in each tile
    (Case(T=3, I=48, O=128, E=8, R=8, outside_logits=True), BF16, "one pass"),  # C = 64 in one buffer, O a whole tile
    (Case(T=257, I=8, O=9, E=2, R=2), FP32, "parts"),  # three tiles of tokens
    (Case(T=72, I=129, O=32, E=16, R=4, gate_bias=True), BF16, "stages"),  # the second buffer begins with a step
    (Case(T=6, I=36, O=36, E=17, R=4), BF16, "parts"),  # one step and four terms before it
    (Case(T=32, I=128, O=31, E=4, R=8), FP32, "one pass"),  # the same in fp32: a step
    (Case(T=36, I=72, O=68, E=9, R=4, renormalize=False, top_k=2), FP32, "one pass"),  # and one step and four terms
    (Case(T=5, I=1, O=1, E=11, R=12), FP16, "one pass"),  # C = 143, and as much shared memory as a block may take
    (Case(T=2, I=0, O=16, E=2, R=8), BF16, "stages"),
    (Case(T=2, I=16, O=0, E=2, R=8), BF16, "one pass"),
    (Case(T=0, I=16, O=16, E=2, R=8), FP32, "parts"),
]


@pytest.mark.parametrize(("case", "dtype", "plan"), EDGES, ids=str)
def test_edges_of_products(case: Case, dtype: torch.dtype, plan: str, emulated_cuda, monkeypatch, watch) -> None:
    """x and dy have gaps of NaN between their rows, and begin anywhere or on 16 bytes."""
    plans.force("cuda", plan, monkeypatch)
    problem = make_problem(case, dtype)
    multiple = int(torch.randint(0, 2, ())) * 7 + 1
    x, dy = (_with_gaps(t, multiple) for t in (problem.tensors["x"], problem.dy))
    factors = calls.factors_of(problem.tensors)
    y, saved = calls.forward_saved("cuda", x, factors, case.options)
    allocated = len(watch.buffers)
    unsaved, _ = calls.forward("cuda", x, factors, case.options, save=False)
    assert torch.equal(y, unsaved)
    assert (len(watch.buffers) == allocated + 1) == (plan == "one pass")  # y alone
    grads = calls.backward("cuda", dy, x, factors, saved, case.options, dlogits=problem.dlogits)
    results = {"y": y, "router_logits": saved.logits, **dict(zip(Gradients._fields, grads, strict=True))}
    if case.outside_logits:
        del results["router_logits"]
    assert_all_no_worse(problem, {name: result for name, result in results.items() if result is not None})


def _with_gaps(t: torch.Tensor, multiple: int) -> torch.Tensor:
    """The same numbers in rows that start on a multiple of so many elements."""
    rows, columns = t.shape
    stride = -(-(columns + 1) // multiple) * multiple
    wide = torch.full((rows + 1, stride), float("nan"), dtype=t.dtype).flatten()[multiple:]
    return wide.as_strided((rows, columns), (stride, 1), wide.storage_offset()).copy_(t)
