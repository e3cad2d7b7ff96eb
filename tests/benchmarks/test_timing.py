"""How the benchmarks sample and summarise, and CUDA graphs on a CPU. No test looks at a time."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks.measuring.group import LAUNCHES, Group
from benchmarks.measuring.timing import QUICK, Call, Spread, interleave
from benchmarks.rows.shapes import PHASES, Shape, grids
from benchmarks.rows.table import rows
from benchmarks.showing import report
from tests.benchmarks.small import BRIEF, CPU, LIMITS, SMALL


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """CUDA graphs on a CPU: a replay is the call itself. The list is not empty during a capture."""
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
    monkeypatch.setattr("benchmarks.measuring.group.capture", capture)
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
    """Autograd runs a backward on its forward's stream, and work on another stream than the capture's ends the capture.

    So does a graph of an earlier forward that is still alive: it keeps the inputs' nodes, and these its stream.
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

    group = Group(SMALL, "layer", ["backward"], [replace(eager, build=build)], CPU, LIMITS, BRIEF)
    group.visit()
    assert [(record.launch, record.status) for record in group.records()] == [("eager", "ok"), ("graph", "ok")]
    assert forwards[-1], "the forward ran before the capture"


def test_a_captured_call_has_leaves_that_no_other_stream_has_used(capturing: list[Callable]) -> None:
    """Autograd ties a leaf to the stream of its first use, and each capture has a stream of its own."""
    eager = rows()["eager"]
    captured: list[Callable] = []

    def build(inputs, scope):
        step, streams = eager.build(inputs, scope), []

        def forward():
            streams.append(capturing[-1] if capturing else None)
            if capturing:
                captured.append(capturing[-1])
                if streams[0] is not capturing[-1]:
                    raise RuntimeError("a leaf of another stream")
            return step.forward()

        return step._replace(forward=forward)

    group = Group(SMALL, "layer", PHASES, [replace(eager, build=build)], CPU, LIMITS, BRIEF)
    group.visit()
    group.visit()
    found = {(record.phase, record.launch): record.status for record in group.records()}
    assert found == {(phase, launch): "ok" for phase in PHASES for launch in ("eager", "graph")}
    assert len(set(map(id, captured))) == 2 * len(PHASES), "a capture for each phase of each visit"


def test_a_row_that_cannot_be_captured_leaves_the_others_alone(capturing: list[Callable]) -> None:
    def build(inputs, scope):
        step = rows()["eager"].build(inputs, scope)
        return step._replace(forward=lambda: 1 / 0 if capturing else step.forward())

    table = [rows()["frozen"], replace(rows()["eager"], build=build)]
    group = Group(SMALL, "layer", PHASES, table, CPU, LIMITS, BRIEF)
    group.visit()
    group.visit()
    found = {(record.row, record.launch): record for record in group.records()}
    assert {key: record.status for key, record in found.items()} == {
        ("frozen", "eager"): "ok", ("frozen", "graph"): "ok",
        ("eager", "eager"): "ok", ("eager", "graph"): "not captured: ZeroDivisionError: division by zero",
    }  # fmt: skip
    assert found["eager", "graph"].seconds is None


def test_a_run_whose_minutes_are_over_writes_its_results(capturing, quickly, tmp_path, capsys, monkeypatch) -> None:
    clock = iter([0.0, 50.0, 70.0])  # at the start, and before each step
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    sizes = ["--shapes", "24x40", "--tokens", "5,6", "--quick", "--rows", "frozen,torch", "--device", "cpu"]
    assert cli.main([*sizes, "--minutes", "1", "--out", str(tmp_path)]) == 0
    assert "stopped after step 2 of 9, its minutes were over" in capsys.readouterr().out
    written = report.load(tmp_path / "results.json")["records"]
    assert {(record["shape"]["tokens"], record["scope"]) for record in written} == {(5, "layer")}
    assert {record["launch"] for record in written} == {"eager", "graph"}
    assert "CUDA graph" in (tmp_path / "results.md").read_text()


def test_a_table_that_breaks_leaves_the_others_alone(quickly, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Group.visit

    def breaks(group: Group) -> None:
        if group.shape.tokens == 5:
            raise RuntimeError("an illegal memory access")
        visit(group)

    monkeypatch.setattr(Group, "visit", breaks)
    sizes = ["--shapes", "24x40", "--tokens", "5,6", "--quick", "--rows", "frozen", "--device", "cpu"]
    assert cli.main([*sizes, "--out", str(tmp_path)]) == 1
    assert "an illegal memory access" in capsys.readouterr().err
    assert {record["shape"]["tokens"] for record in report.load(tmp_path / "results.json")["records"]} == {6}


def test_on_a_gpu_the_shapes_of_the_goals_come_first_and_each_group_once() -> None:
    tables = grids(torch.device("cuda"), quick=False)
    groups = [(shape, scope, grid.rows) for grid in tables for shape, scope in grid.groups()]
    assert groups[0][0] == Shape(8192, 4096, 4096, dtype="bfloat16")
    assert len(set(groups)) == len(groups)
    tokens = {shape.tokens for shape, _, _ in groups if shape.in_features == shape.out_features == 4096}
    assert tokens == {1, 4, 16, 64, 256, 512, 1024, 4096, 8192, 16384}
