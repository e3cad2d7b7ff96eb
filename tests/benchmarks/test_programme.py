"""`make gpu` rehearsed on CPU tensors: the order of its steps, where a second call goes on, what a failure stops.

Nothing is timed, and no test of the GPU runs: the clock, the tests' verdicts and the launches are simulated.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts, programme, tuner
from benchmarks.gpu.programme import Line, Programme, Step
from benchmarks.measuring.group import Record
from benchmarks.rows.shapes import Grid, Shape
from benchmarks.rows.table import rows
from benchmarks.showing import report
from lmoe_kernels import dispatch
from lmoe_kernels.backends.triton import configs, host
from tests.benchmarks.small import BRIEF, CPU, LIMITS

SMALL = Shape(5, 24, 40, dtype="bfloat16")
ORDER = ["limits", "tests-large", "tests", "goals", "compiled", "tiles", "experts", "sanitizers"]


class Rehearsal:
    """A simulated machine: what its tests say, and which steps were run, in their order."""

    def __init__(self) -> None:
        self.wrong: set[str] = set()  # engines whose tests fail, or choices of tests that do
        self.seconds_of_a_step = 0.0
        self.now = 0.0
        self.ran: list[tuple[str, str]] = []

    def pytest(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        choice = command[command.index("-k") + 1]
        return subprocess.CompletedProcess(
            command, int(bool({choice, choice.split()[-1]} & self.wrong)), stdout="1 passed\n"
        )

    def main(self, *arguments: str) -> tuple[int, list[str]]:
        """The exit status of a call, and the parts of which it has run a step."""
        self.ran.clear()
        status = gpu.main(list(arguments))
        return status, list(dict.fromkeys(part for part, _ in self.ran))

    def steps(self, part: str) -> list[str]:
        return [name for of, name in self.ran if of == part]


def lines_of(folder: Path, part: str) -> list[Line]:
    """What a part has written, but for the machine's line."""
    (path,) = folder.glob(f"{part}-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def simulated(run: Callable) -> SimpleNamespace:
    """The module subprocess for the tests of the GPU alone."""
    return SimpleNamespace(run=run, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    rehearsal = Rehearsal()
    write = Programme._write

    def written(self: Programme, part: str, lines: list[Line]) -> None:
        rehearsal.now += rehearsal.seconds_of_a_step
        rehearsal.ran.extend({(part, line["step"]): None for line in lines})
        write(self, part, lines)

    known = rows()
    few = {name: known[name] for name in ("frozen", "torch")}
    few |= {name: replace(known["torch"], name=name, label=f"ours, {name}") for name in ("triton", "triton-fp32")}
    few |= {"by-compiler": replace(known["torch"], name="by-compiler", label="by a compiler", compiled=True)}
    few |= {"xlora": replace(known["torch"], name="xlora", build=lambda *_: pytest.fail("a slow row is built"))}
    takes_all = {
        name: dispatch.BACKENDS[name]._replace(why_not=lambda problem: None) for name in ("triton", "torch", "reference")
    }
    monkeypatch.setattr(Programme, "_write", written)
    monkeypatch.setattr(programme.time, "monotonic", lambda: rehearsal.now)
    monkeypatch.setattr(gpu, "this_gpu", lambda: CPU)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(parts, "subprocess", simulated(rehearsal.pytest))
    monkeypatch.setattr(parts, "measure_limits", lambda device, dtypes, quick: LIMITS)
    monkeypatch.setattr(parts, "grids", lambda device, quick: [Grid((SMALL,), ("layer", "delta"), ("forward",))])
    monkeypatch.setattr(parts, "rows", lambda: few)
    monkeypatch.setattr(parts, "EFFORT", BRIEF)
    monkeypatch.setattr(parts, "TUNED", (SMALL,))
    monkeypatch.setattr(parts, "BACKENDS", takes_all)
    monkeypatch.setattr(parts, "timed_backends", lambda: ["triton", "torch"])
    monkeypatch.setattr(configs, "SEARCH_SPACE", {"T": (16, 32)})
    monkeypatch.setattr(host, "launch", lambda *args, **options: None)
    monkeypatch.setattr(tuner, "median_us", lambda call: 1.0)
    monkeypatch.setattr(tuner, "compile_all", lambda shape, found, chip: rehearsal.ran.append(("kernels", str(len(found)))))
    return rehearsal


def test_the_whole_programme_in_its_order(machine: Rehearsal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, order = machine.main()
    assert (status, order) == (0, [*ORDER[:5], "kernels", *ORDER[5:]]), "kernels are compiled before the tiles are timed"
    assert machine.steps("tests-large") == machine.steps("tests") == ["triton", "cuda"]
    assert machine.steps("goals") == [f"{SMALL}: layer", f"{SMALL}: delta"]
    assert machine.steps("compiled") == [f"{SMALL}: layer"]
    assert machine.steps("sanitizers") == ["triton", "cuda"]
    assert len(machine.steps("experts")) == 5 * 2 * 2
    assert "wgrad_plan, T=5: chosen 1.0 us, best 1.0 us" in capsys.readouterr().out
    assert len(machine.steps("kernels")) == 1
    (folder,) = (tmp_path / "build" / "gpu").iterdir()
    kept = report.load(folder / "results.json")
    of_part = {part: {line["row"] for line in lines_of(folder, part)} for part in ("goals", "compiled")}
    assert of_part == {
        "goals": {"frozen", "torch", "triton", "triton-fp32"},
        "compiled": {"frozen", "torch", "triton", "by-compiler"},
    }
    assert {record["row"] for record in kept["records"]} == of_part["goals"] | of_part["compiled"]
    assert "ours, triton" in (folder / "results.md").read_text()
    for path in folder.glob("*.jsonl"):
        machine_line, *lines = map(json.loads, path.read_text().splitlines())
        assert "packages" in machine_line
        assert all("step" in line for line in lines)


def test_without_a_gpu_nothing_is_run(machine: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "this_gpu", lambda: None)
    assert machine.main() == (1, [])


def test_a_second_call_repeats_nothing(machine: Rehearsal) -> None:
    machine.main()
    assert machine.main() == (0, [])


@pytest.mark.parametrize("part", ORDER)
def test_parts_that_are_named(machine: Rehearsal, part: str) -> None:
    assert machine.main("--parts", part) == (0, ["kernels", part] if part == "tiles" else [part])


def test_a_call_goes_on_where_the_time_was_up(machine: Rehearsal, tmp_path: Path) -> None:
    machine.main()
    every = [step for step in machine.ran if step[0] != "kernels"]
    machine.seconds_of_a_step = 40.0
    ran: list[tuple[str, str]] = []
    for call in range(100):
        status, _ = machine.main("--minutes", "3", "--out", str(tmp_path / "other"))
        assert len(machine.steps("kernels")) <= 1
        done = [step for step in machine.ran if step[0] != "kernels"]
        assert len(done) == 5 or status == 0, call
        ran += done
        if status == 0:
            break
    assert ran == every


def test_other_sources_are_measured_anew(machine: Rehearsal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.main("--parts", "limits")
    monkeypatch.setattr(programme, "state_of_the_sources", lambda: "changed")
    assert machine.main("--parts", "limits") == (0, ["limits"])
    assert len(list(tmp_path.rglob("limits-*.jsonl"))) == 2


def test_the_state_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programme, "ROOT", tmp_path)
    for name in ("lmoe_kernels/backends/kernel.py", "csrc/cuda/kernel.cu", "csrc/cuda/kernel.cuh", "csrc/params.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        before = programme.state_of_the_sources()
        (tmp_path / name).write_text("x")
        assert programme.state_of_the_sources() != before, name
    before = programme.state_of_the_sources()
    (tmp_path / "README.md").write_text("x")
    assert programme.state_of_the_sources() == before


def test_a_wrong_engine_is_not_timed_and_all_else_is(machine: Rehearsal, tmp_path: Path) -> None:
    machine.wrong = {"triton"}
    status, order = machine.main()
    assert (status, order) == (1, [part for part in ORDER if part != "tiles"])
    assert machine.steps("tests-large") == machine.steps("tests") == ["triton", "cuda"]
    assert {step.split(",")[0] for step in machine.steps("experts")} == {"torch"}
    (path,) = tmp_path.rglob("results.json")
    assert {record["row"] for record in report.load(path)["records"]} == {"frozen", "torch", "by-compiler"}


def test_an_engine_that_is_wrong_on_large_shapes_alone_is_not_timed(machine: Rehearsal) -> None:
    machine.wrong = {f"{parts.LARGE} and triton"}
    assert machine.main("--parts", "tests-large", "tests", "tiles") == (1, ["tests-large", "tests"])
    assert machine.main("--parts", "tests", "tiles") == (0, []), "nor in a later call"


def test_failed_tests_are_repeated_and_the_engine_is_timed_once_they_pass(machine: Rehearsal) -> None:
    machine.wrong = {"triton"}
    machine.main("--parts", "tests", "tiles")
    machine.wrong = set()
    assert machine.main("--parts", "tests", "tiles") == (0, ["tests", "kernels", "tiles"])
    assert machine.steps("tests") == ["triton"]


def test_tests_that_were_cut_off_are_not_finished(machine: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(command: list[str], *, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(parts, "subprocess", simulated(cut_off))
    assert machine.main("--parts", "tests", "--minutes", "1") == (1, [])
    monkeypatch.setattr(parts, "subprocess", simulated(machine.pytest))
    assert machine.main("--parts", "tests") == (0, ["tests"])


def test_a_row_that_stops_the_gpu_ends_the_call_and_the_next_one_goes_on(
    machine: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(call: Callable) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    machine.seconds_of_a_step = 1.0
    monkeypatch.setattr(tuner, "median_us", fails)
    assert machine.main("--parts", "experts") == (1, ["experts"])
    assert machine.steps("experts") == ["triton, E=8, top_k=2"]
    monkeypatch.setattr(tuner, "median_us", lambda call: 1.0)
    assert machine.main("--parts", "experts") == (0, ["experts"])
    assert machine.steps("experts")[0] == "torch, E=8, top_k=2"


def test_a_step_that_fails_ends_no_other(tmp_path: Path) -> None:
    def fails() -> list[Line]:
        raise ValueError("out of something")

    call = Programme(tmp_path, CPU)
    assert not call.perform("part", [Step("one", fails), Step("two", lambda: [{"us": 1}])])
    assert call.lines("part") == [{"step": "one", "error": "ValueError: out of something"}, {"step": "two", "us": 1}]
    assert Programme(tmp_path, CPU).lines("part") == call.lines("part")


def test_a_table_whose_row_has_stopped_the_gpu_is_not_kept(
    machine: Rehearsal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped = Record(
        "torch", "ours", "layer", "forward", "eager", SMALL, "failed: AcceleratorError: CUDA error: misaligned address"
    )
    machine.seconds_of_a_step = 1.0
    monkeypatch.setattr(parts.Group, "records", lambda self: iter([stopped]))
    assert machine.main("--parts", "goals") == (1, ["goals"])
    assert len(machine.steps("goals")) == 1, "nothing is measured after it"
    (path,) = tmp_path.rglob("goals-*.jsonl")
    _, line = map(json.loads, path.read_text().splitlines())
    assert line == {"step": f"{SMALL}: layer", "error": f"RuntimeError: ours: {stopped.status}"}
