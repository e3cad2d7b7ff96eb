"""How the benchmarks sample and sum up, and what they do of a GPU's part. No test looks at a time."""

import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import report
from benchmarks.baselines import rows
from benchmarks.limits import Limits
from benchmarks.measure import LAUNCHES, Group
from benchmarks.shapes import DTYPES, PHASES, Shape, grids
from benchmarks.timing import QUICK, Call, Effort, Spread, interleave
from tools.emulator import build

BRIEF = Effort(visits=1, seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=0.0, cpu_products=2**33)
LIMITS = Limits(1e9, dict.fromkeys(DTYPES, 1e12), dict.fromkeys(DTYPES, 1e11), cache_bytes=1)
SMALL = Shape(tokens=5, in_features=24, out_features=40, num_experts=3, rank=4)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """CUDA graphs on a CPU: a call stands for its replay. The list holds what is being captured."""
    running: list[Callable] = []

    def capture(make: Callable[[], Call]) -> Call:
        running.append(make)
        try:
            call = make()
            call()
        finally:
            running.pop()
        return call

    monkeypatch.setitem(LAUNCHES, "cpu", LAUNCHES["cuda"])
    monkeypatch.setattr("benchmarks.measure.capture", capture)
    return running


def test_rounds_sample_every_row_once_in_changing_order() -> None:
    class Clock:
        def __init__(self) -> None:
            self.order: list[str] = []

        def sample(self, calls, first: int, count: int) -> float:
            self.order.append(calls[first % len(calls)]())
            return 1.0

    clock = Clock()
    names = [f"row {i}" for i in range(6)]
    calls = {name: [lambda name=name: name] for name in names}
    samples = interleave(calls, clock, replace(QUICK, seconds=0.0, min_rounds=5))
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys(names, 5)
    rounds = [tuple(clock.order[start : start + 6]) for start in range(len(clock.order) - 30, len(clock.order), 6)]
    assert all(sorted(one) == names for one in rounds)
    assert len(set(rounds)) > 1


def test_spread() -> None:
    assert Spread.of([[3.0]]) == Spread(3.0, 3.0, 3.0, (3.0,))
    assert Spread.of([[5.0, 1.0, 2.0], [3.0, 4.0, 6.0]]) == Spread(3.5, 2.0, 5.0, (2.0, 4.0))


def test_a_graph_holds_the_backward_of_a_forward_on_its_own_stream(capturing: list[Callable]) -> None:
    """Autograd runs a backward on its forward's stream, and another one than the capture's would break it off.

    So would a graph of an earlier forward that lives on: it holds the leaves' nodes, and these its stream.
    """
    forwards: list[bool] = []
    earlier: list[weakref.ref] = []
    eager = rows()["eager"]

    def build(inputs, scope):
        step = eager.build(inputs, scope)

        def forward():
            forwards.append(bool(capturing))
            y = step.forward()
            if not capturing:
                earlier.append(weakref.ref(y))
            elif any(ref() is not None for ref in earlier):
                raise RuntimeError("an eager forward's graph is alive")
            return y

        return step._replace(forward=forward)

    group = Group(SMALL, "layer", ["backward"], [replace(eager, build=build)], torch.device("cpu"), LIMITS, BRIEF)
    group.visit()
    assert [(record.launch, record.status) for record in group.records()] == [("eager", "ok"), ("graph", "ok")]
    assert forwards[-1], "the forward ran before the capture"


def test_a_row_that_no_graph_holds_leaves_the_others_alone(capturing: list[Callable]) -> None:
    def build(inputs, scope):
        step = rows()["eager"].build(inputs, scope)
        return step._replace(forward=lambda: 1 / 0 if capturing else step.forward())

    table = [rows()["frozen"], replace(rows()["eager"], build=build)]
    group = Group(SMALL, "layer", PHASES, table, torch.device("cpu"), LIMITS, BRIEF)
    group.visit()
    group.visit()
    found = {(record.row, record.launch): record for record in group.records()}
    assert {key: record.status for key, record in found.items()} == {
        ("frozen", "eager"): "ok", ("frozen", "graph"): "ok",
        ("eager", "eager"): "ok", ("eager", "graph"): "not captured: ZeroDivisionError: division by zero",
    }  # fmt: skip
    assert found["eager", "graph"].seconds is None


def test_a_run_whose_minutes_are_over_writes_what_it_has(capturing, tmp_path, capsys, monkeypatch) -> None:
    clock = iter([0.0, 50.0, 70.0])  # at the start, and before each step
    threads = torch.get_num_threads()
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(cli, "measure_limits", lambda device, dtypes, quick: LIMITS)
    monkeypatch.setattr(cli, "QUICK", BRIEF)
    monkeypatch.setattr(cli, "Progress", lambda total: Steps())
    sizes = ["--shapes", "24x40", "--tokens", "5,6", "--quick", "--rows", "frozen,torch", "--device", "cpu"]
    assert cli.main([*sizes, "--minutes", "1", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    assert "its minutes were over" in capsys.readouterr().out
    written = report.load(tmp_path / "results.json")["records"]
    assert {(record["shape"]["tokens"], record["scope"]) for record in written} == {(5, "layer")}
    assert {record["launch"] for record in written} == {"eager", "graph"}
    assert "CUDA graph" in (tmp_path / "results.md").read_text()


def test_a_table_that_breaks_leaves_the_others_alone(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    visit, threads = Group.visit, torch.get_num_threads()

    def breaks(group: Group) -> None:
        if group.shape.tokens == 5:
            raise RuntimeError("an illegal memory access")
        visit(group)

    monkeypatch.setattr(Group, "visit", breaks)
    monkeypatch.setattr(cli, "measure_limits", lambda device, dtypes, quick: LIMITS)
    monkeypatch.setattr(cli, "QUICK", BRIEF)
    sizes = ["--shapes", "24x40", "--tokens", "5,6", "--quick", "--rows", "frozen", "--device", "cpu"]
    assert cli.main([*sizes, "--out", str(tmp_path)]) == 1
    torch.set_num_threads(threads)
    assert "an illegal memory access" in capsys.readouterr().err
    assert {record["shape"]["tokens"] for record in report.load(tmp_path / "results.json")["records"]} == {6}


def test_the_cost_of_the_host_is_counted_where_nothing_is_launched(request: pytest.FixtureRequest) -> None:
    """In a process of its own: the emulator launches nothing from then on."""
    if build.COMPILER is None:
        pytest.skip("no g++ to compile the launchers")
    program = "from benchmarks import bench_host as b; b.CALLS = b.ROUNDS = 2; b.main()"
    command = [sys.executable, "-c", program, "--cache", str(request.config.cache.mkdir("cuda_emu"))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["T=1", "T=16", "T=512"]


class Steps:
    """A progress bar that shows nothing."""

    done = total = 4

    def step(self, name: str) -> None:
        pass

    def end(self) -> None:
        pass


def test_on_a_gpu_the_shapes_of_the_goals_come_first_and_each_group_once() -> None:
    tables = grids(torch.device("cuda"), quick=False)
    groups = [(shape, scope, grid.rows) for grid in tables for shape, scope in grid.groups()]
    assert groups[0][0] == Shape(8192, 4096, 4096, dtype="bfloat16")
    assert len(set(groups)) == len(groups)
    tokens = {shape.tokens for shape, _, _ in groups if shape.in_features == shape.out_features == 4096}
    assert tokens == {1, 4, 16, 64, 256, 512, 1024, 4096, 8192, 16384}
