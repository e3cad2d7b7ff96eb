"""CUDA graphs of the cuda backend on a GPU: a first call within a capture, and replays at the same time."""

import subprocess
import sys

import pytest
import torch

from lmoe_kernels.dispatch import BACKENDS
from lmoe_kernels.options import Problem, Sizes
from tests.problems import Case, gradients, leaves_of, make_problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TOKENS = [4, 70, 8192]  # decode, split sums, one pass
PROGRAM = """
import torch
from tests.problems import Case, gradients, leaves_of, make_problem
problem = make_problem(Case(T={tokens}, I=1024, O=1024, E=8, R=16), torch.bfloat16, device="cuda")
leaves = leaves_of(problem.tensors)
def step(backend):
    results = problem.call(backend, **leaves)
    return [*results, *gradients(problem, results, leaves).values()]
step("torch")  # loads PyTorch's own kernels, which the loss uses, but none of the extension's
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step("cuda")
graph.replay()
assert all(torch.equal(*pair) for pair in zip(captured, step("cuda"), strict=True))
"""


@pytest.fixture(autouse=True)
def _available() -> None:
    reason = BACKENDS["cuda"].why_not(Problem(Sizes(1, 1, 1, 1, 1, 1), torch.bfloat16, torch.device("cuda", 0)))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_first_call_of_a_process_within_a_capture(tokens: int) -> None:
    """The driver loads the kernels' machine code then, which must not end the capture."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(tokens=tokens)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("tokens", TOKENS)
def test_graphs_that_are_replayed_at_the_same_time(tokens: int) -> None:
    """Of the same call, on several streams: none shares a workspace or a barrier of the grid with another."""
    problem = make_problem(Case(T=tokens, I=1024, O=1024, E=8, R=16), torch.bfloat16, device="cuda")

    def step() -> list[torch.Tensor]:
        leaves = leaves_of(problem.tensors)  # autograd ties a leaf to the stream of its first use
        results = problem.call("cuda", **leaves)
        return [*results, *gradients(problem, results, leaves).values()]

    expected = step()
    graphs, captured, streams = [], [], [torch.cuda.Stream() for _ in range(3)]
    for _ in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.append(step())
        graphs.append(graph)
    torch.cuda.synchronize()
    for _ in range(100):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for results in captured:
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
