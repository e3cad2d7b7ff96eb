"""The Triton and the CUDA kernels on a GPU: large shapes, repeated bits, graphs, long offsets, sanitizers.

`make gpu` runs these with `-m gpu`; then no kernel is interpreted or emulated.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels import lmoe, reference
from lmoe_kernels.dispatch import BACKENDS, load
from lmoe_kernels.dropout import new_seed
from lmoe_kernels.options import Problem, Sizes
from tests.problems import CASES, Case, assert_all_no_worse, eager, gradients, leaves_of, make_problem, outcome
from tests.problems import Problem as RandomProblem
from tools.error_rule import assert_no_worse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LARGE = [
    Case(T=8192, I=4096, O=4096, E=8, R=16, linear=True),
    Case(T=16384, I=2048, O=2048, E=8, R=32, mixing="outputs"),
    Case(T=1024, I=4096, O=14336, E=8, R=16),
    Case(T=16, I=4096, O=4096, E=8, R=16),
    Case(T=4096, I=4096, O=4096, E=64, R=16, top_k=2),
    Case(T=4096, I=1000, O=3001, E=5, R=3, shared_a=True),
    Case(T=8192, I=4096, O=4096, E=8, R=16, linear=True, dropout=0.1),
]


@pytest.fixture(params=[name for name in BACKENDS if name not in ("torch", "reference")])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels of its own that can run here, as it is built."""
    problem = Problem(Sizes(1, 1, 1, 1, 1, 1), torch.bfloat16, torch.device("cuda", 0))
    reason = BACKENDS[request.param].why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def _judge(problem: RandomProblem, backend: str) -> None:
    """The error rule; the truth is the factored form in float64, because the definition does not fit the memory."""
    leaves, true_leaves = leaves_of(problem.tensors), leaves_of(problem.tensors, torch.float64)
    true = outcome(problem, eager(problem, true_leaves), true_leaves)
    assert_all_no_worse(problem, outcome(problem, problem.call(backend, **leaves), leaves), true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_shapes(case: Case, dtype: torch.dtype, backend: str) -> None:
    """In bf16 the first that `make gpu` runs."""
    _judge(make_problem(case, dtype, device="cuda"), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_worse_than_plain_pytorch(case: Case, dtype: torch.dtype, backend: str) -> None:
    _judge(make_problem(case, dtype, device="cuda"), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features", "step"), [(8192, 4096, 4096), (16, 4096, 4104), (1000, 3001, 3001)])
def test_dropout_has_the_bits_of_the_reference(
    tokens: int, features: int, step: int, dtype: torch.dtype, backend: str
) -> None:
    rows = torch.randn(tokens, step, device="cuda").to(dtype)[:, :features]
    seed = new_seed(rows.device)
    assert torch.equal(load(backend).dropout(rows, seed, 0.1), reference.dropout(rows, seed, 0.1))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_fp32_parameters(case: Case, backend: str) -> None:
    _judge(make_problem(case, torch.bfloat16, param_dtype=torch.float32, device="cuda"), backend)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_same_bits_every_time(case: Case, backend: str) -> None:
    problem = make_problem(case, torch.bfloat16, device="cuda")
    leaves = leaves_of(problem.tensors)
    runs = []
    for _ in range(3):
        results = problem.call(backend, **leaves)
        runs.append([*results, *gradients(problem, results, leaves).values()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("T", [16, 4096])
def test_in_a_graph(T: int, backend: str) -> None:
    problem = make_problem(Case(T=T, I=1024, O=1024, E=8, R=16), torch.bfloat16, device="cuda")
    leaves = leaves_of(problem.tensors)

    def step() -> list[torch.Tensor]:
        results = problem.call(backend, **leaves)
        return [*results, *gradients(problem, results, leaves).values()]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
    graph.replay()
    for replayed, eager_result in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager_result)


def test_a_graph_and_plain_calls_at_the_same_time(backend: str) -> None:
    """On two streams: the workspace of a launch must not be shared with another launch, a replay included."""
    problem = make_problem(Case(T=4, I=1024, O=1024, E=8, R=16), torch.bfloat16, device="cuda")
    expected, _ = problem.call(backend)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        replayed, _ = problem.call(backend)
    torch.cuda.synchronize()
    results = []
    for _ in range(200):
        with torch.cuda.stream(side):
            graph.replay()
        results.append(problem.call(backend)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in (replayed, *results))


@pytest.mark.parametrize("T", [4, 300])
@pytest.mark.parametrize("start", [1, 4, 8])
def test_rows_that_start_anywhere(start: int, T: int, backend: str) -> None:
    problem = make_problem(Case(T=T, I=520, O=120, E=4, R=8), torch.bfloat16, device="cuda")
    dense, _ = problem.call(backend)
    y, _ = problem.call(backend, x=torch.nn.functional.pad(problem.tensors["x"], (start, 0))[:, start:])
    true, _ = eager(problem, {name: t.double() for name, t in problem.tensors.items()})
    assert_no_worse("y", y, [dense], true)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one(backend: str) -> None:
    _judge(make_problem(Case(T=70), torch.bfloat16, device="cuda:1"), backend)


def test_more_than_two_to_the_31_elements(backend: str) -> None:
    T, I = 2**31 // 4096 + 300, 4096  # noqa: E741
    problem = make_problem(Case(T=300, I=I, O=4096, E=8, R=16), torch.bfloat16, device="cuda")
    x = torch.zeros(T, I, dtype=torch.bfloat16, device="cuda")
    x[-300:] = problem.tensors["x"]
    t = problem.tensors
    with torch.no_grad():
        y = lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], scaling=0.75, backend=backend)
        few, _ = problem.call(backend)
        assert_no_worse("the last tokens", y[-300:], [few], eager(problem, {n: v.double() for n, v in t.items()})[0])
        assert (y[:-300] == 0).all()


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str, backend: str) -> None:
    program = (
        "import torch; from tests.problems import *\n"
        "for case in (Case(), Case(T=300, I=130, O=70, E=8, R=16), Case(T=20000, I=64, O=64, E=8, R=16)):\n"
        "    p = make_problem(case, torch.bfloat16, device='cuda'); leaves = leaves_of(p.tensors)\n"
        f"    gradients(p, p.call({backend!r}, **leaves), leaves)\n"
    )
    # errors of API calls are ignored: torch and its libraries make some that fail on purpose, to test what the driver can
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command = ["compute-sanitizer", *options, sys.executable, "-c", program]
    # each tensor in an allocation of its own: in PyTorch's large ones an access outside a tensor is not out of bounds
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
