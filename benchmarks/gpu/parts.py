"""The steps of each part of the programme."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu import tuner
from benchmarks.gpu.programme import ROOT, Line, Programme, Step, is_fatal
from benchmarks.measuring.group import Group
from benchmarks.measuring.limits import Limits, measure_limits
from benchmarks.measuring.timing import Effort
from benchmarks.rows.shapes import Shape, grids, make_inputs, timed_backends
from benchmarks.rows.steps import Row
from benchmarks.rows.table import rows
from lmoe_kernels import lmoe
from lmoe_kernels.dispatch import BACKENDS, BackendName

ENGINES = ("triton", "cuda")  # the backends with kernels of their own
LARGE = "test_large_shapes and bfloat16"  # in the words of pytest's -k
TUNED = tuple(Shape(tokens, 4096, 4096, dtype="bfloat16") for tokens in (8192, 1024))
EFFORT = Effort(visits=2, seconds=0.3, min_rounds=3, max_rounds=11, sample_seconds=2e-3, cpu_products=2**33)
SLOW = ("literal", "loop", "peft-all", "xlora")  # rows that take most of a table's time, and are the slowest in each


def limits(programme: Programme) -> Iterator[Step]:
    """What the chip can do at most: copies, reads out of the L2, products."""
    yield Step("limits", lambda: [asdict(measure_limits(programme.device, ["bfloat16"], quick=False))])


def tests_large(programme: Programme) -> Iterator[Step]:
    """The large shapes in bf16 alone: whether an engine is right at all."""
    for engine in ENGINES:
        yield Step(engine, partial(tested, programme, engine, f"{LARGE} and {engine}"))


def tests(programme: Programme) -> Iterator[Step]:
    """All other tests on a GPU, but for the sanitizers."""
    for engine in ENGINES:
        yield Step(engine, partial(tested, programme, engine, f"not ({LARGE}) and not sanitizer and {engine}"))


def sanitizers(programme: Programme) -> Iterator[Step]:
    """The tools of compute-sanitizer, those of an engine at once."""
    for engine in ENGINES:
        yield Step(engine, partial(tested, programme, engine, f"sanitizer and {engine}"))


def goals(programme: Programme) -> Iterator[Step]:
    """The rows that need no compiler on the shapes of the goals, layer first, then delta: forward, backward and both."""
    grid = grids(torch.device("cuda"), quick=False)[0]
    for scope in grid.scopes:
        for shape in grid.shapes:
            yield table(programme, shape, scope, grid.phases, lambda row: not row.compiled)


def compiled(programme: Programme) -> Iterator[Step]:
    """The rows of torch.compile on two shapes, next to the frozen linear and the backends; they wait for its compiler."""
    grid = grids(torch.device("cuda"), quick=False)[0]
    backends = {"frozen", *timed_backends()}
    for shape in grid.shapes[:2]:
        yield table(programme, shape, "layer", grid.phases, lambda row: row.compiled or row.name in backends)


def table(programme: Programme, shape: Shape, scope: str, phases: tuple[str, ...], wanted: Callable[[Row], bool]) -> Step:
    """The wanted rows on one shape, without those that are slow and those of engines whose tests failed."""
    timed = [row for row in rows().values() if wanted(row) and row.name not in SLOW]
    timed = [row for row in timed if not row.name.startswith(tuple(programme.wrong()))]
    make = partial(Group, shape, scope, phases, timed, programme.device, effort=EFFORT)
    return Step(f"{shape}: {scope}", partial(visited, programme, make))


def tiles(programme: Programme) -> Iterator[Step]:
    """The tuner of the Triton backend, on its usual shape."""
    for shape in () if "triton" in programme.wrong() else TUNED:
        yield from tuner.steps(programme, shape)


def experts(programme: Programme) -> Iterator[Step]:
    """Forward + backward of the delta over E, two experts a token and all of them, on every backend that can."""
    for num_experts, top_k in product((8, 16, 32, 64, 128), (2, None)):
        shape = replace(TUNED[0], num_experts=num_experts)
        for name in timed_backends():
            if name not in programme.wrong() and BACKENDS[name].why_not(shape.problem(programme.device)) is None:
                yield Step(f"{name}, E={num_experts}, top_k={top_k}", partial(of_experts, programme, shape, top_k, name))


PARTS: dict[str, Callable[[Programme], Iterator[Step]]] = {
    "limits": limits,
    "tests-large": tests_large,
    "tests": tests,
    "goals": goals,
    "compiled": compiled,
    "tiles": tiles,
    "experts": experts,
    "sanitizers": sanitizers,
}


def tested(programme: Programme, engine: str, choice: str) -> list[Line]:
    """Run some of the tests, in parallel with pytest-xdist: they spend most of their time in compilers, one core each.

    With 12 workers on 16 cores all tests but the sanitizers took 24 to 32 s, and six sanitizers at once 19 s (an H200,
    2026-11-26).
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", choice, "tests/gpu"]
    if find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(12, 3 * (os.cpu_count() or 1) // 4)))]
    left = programme.seconds_left()
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True, timeout=None if left == float("inf") else left
        )
    except subprocess.TimeoutExpired:
        return []
    print(done.stdout)
    return [{"engine": engine, "passed": done.returncode == 0, "summary": done.stdout.splitlines()[-20:]}]


def visited(programme: Programme, make: Callable[..., Group]) -> list[Line]:
    """The records of a table; a row with a wrong result has no speed."""
    known = programme.lines("limits")
    if known:
        least = Limits(**{field.name: known[-1][field.name] for field in fields(Limits)})
    else:
        least = measure_limits(programme.device, ["bfloat16"], quick=True)
    group = make(limits=least)
    for _ in range(EFFORT.visits):
        group.visit()
    found = list(group.records())
    for record in found:
        if is_fatal(record.status):
            raise RuntimeError(f"{record.label}: {record.status}")
    return [asdict(record) for record in found]


def of_experts(programme: Programme, shape: Shape, top_k: int | None, name: BackendName) -> list[Line]:
    """The time of one backend."""
    inputs = make_inputs(shape, programme.device)
    tensors = [t.requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.gate_weight)]
    time = tuner.time_of(partial(_forward_backward, tensors, inputs.dy, top_k, name))
    return [{"backend": name, "top_k": top_k} | asdict(shape) | time]


def _forward_backward(tensors: list[Tensor], dy: Tensor, top_k: int | None, backend: BackendName) -> tuple[Tensor, ...]:
    x, a, b, gate = tensors
    return torch.autograd.grad(lmoe(x, a, b, gate_weight=gate, top_k=top_k, backend=backend), tensors, dy)
