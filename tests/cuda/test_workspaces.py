"""The backward's workspace holds the longest of its sums in parts: of A and the gate, of B, or of dv."""

import pytest
import torch

from tests import plans
from tests.problems import Case, assert_all_no_worse, gradients, leaves_of, make_problem

# The watch's canaries stand behind the buffer: what a workspace lacks here is less than they are.
LONGEST = {
    "dlora_a and dgate_weight": Case(T=35, I=24, O=24, E=2, R=2),
    "dgate_weight": Case(T=35, I=40, O=8, E=4, R=1, shared_a=True),
    "dlora_b": Case(T=35, I=24, O=40, E=2, R=2, shared_a=True),
    "dv": Case(T=35, I=3, O=3, E=1, R=2),
}


@pytest.mark.parametrize("longest", LONGEST)
def test_the_workspace_holds_the_longest_sum(longest: str, emulated_cuda, monkeypatch: pytest.MonkeyPatch, watch) -> None:
    plans.force("cuda", "parts", monkeypatch)
    case, splits = LONGEST[longest], 2
    experts_of_a = 1 if case.shared_a else case.E
    sums = {
        "dlora_a and dgate_weight": splits * (experts_of_a * case.R + case.E) * case.I,
        "dlora_b": splits * case.E * case.R * case.O,
        "dv": splits * case.T * case.E * case.R,
    }
    assert max(sums, key=lambda name: sums[name]) == {"dgate_weight": "dlora_a and dgate_weight"}.get(longest, longest)
    problem = make_problem(case, torch.bfloat16)
    leaves = leaves_of(problem.tensors)
    results = problem.call("cuda", **leaves)
    allocated = len(watch.buffers)
    assert_all_no_worse(problem, gradients(problem, results, leaves))
    counts = [count for buffer, count in watch.buffers[allocated:] if buffer.dtype == torch.float32]
    assert max(sums.values()) in counts, "neither more nor less"
