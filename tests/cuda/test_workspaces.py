"""The backward's workspace for partial sums fits the largest of its split products: for A and the gate, for B, or for dv."""

import pytest
import torch

from tests import plans
from tests.problems import Case, assert_all_no_worse, gradients, leaves_of, make_problem

# A workspace that is too small here lacks fewer elements than the watch has canaries after each buffer.
LARGEST = {
    "dlora_a and dgate_weight": Case(T=35, I=24, O=24, E=2, R=2),
    "dgate_weight": Case(T=35, I=40, O=8, E=4, R=1, shared_a=True),
    "dlora_b": Case(T=35, I=24, O=40, E=2, R=2, shared_a=True),
    "dv": Case(T=35, I=3, O=3, E=1, R=2),
}


@pytest.mark.parametrize("largest", LARGEST)
def test_the_workspace_fits_the_largest_split_product(
    largest: str, emulated_cuda, monkeypatch: pytest.MonkeyPatch, watch
) -> None:
    plans.force("cuda", "parts", monkeypatch)
    case, splits = LARGEST[largest], 2
    experts_of_a = 1 if case.shared_a else case.E
    sums = {
        "dlora_a and dgate_weight": splits * (experts_of_a * case.R + case.E) * case.I,
        "dlora_b": splits * case.E * case.R * case.O,
        "dv": splits * case.T * case.E * case.R,
    }
    assert max(sums, key=lambda name: sums[name]) == {"dgate_weight": "dlora_a and dgate_weight"}.get(largest, largest)
    problem = make_problem(case, torch.bfloat16)
    leaves = leaves_of(problem.tensors)
    results = problem.call("cuda", **leaves)
    allocated = len(watch.buffers)
    assert_all_no_worse(problem, gradients(problem, results, leaves))
    counts = [count for buffer, count in watch.buffers[allocated:] if buffer.dtype == torch.float32]
    assert max(sums.values()) in counts, "the workspace is too small or too large"
