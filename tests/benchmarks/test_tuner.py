"""What the tuner of `make gpu` times, on CPU tensors and without a clock: the calls are those that its lines name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import parts, tuner
from benchmarks.gpu.programme import Line, Programme
from benchmarks.measuring.timing import Call
from benchmarks.rows.shapes import Shape
from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.plans import Chip, ForwardPlan, Tile
from tests import plans
from tests.benchmarks.small import CPU
from tests.triton.compiling import run_compiled

CHIP = Chip("sm_90", 64, 227 << 10)
# The kernels of the candidates are those that were compiled before the clock starts.
COMPILED_BEFORE = """
import torch
from lmoe_kernels.backends.triton import configs, precompile
from benchmarks.gpu import tuner
from benchmarks.rows.shapes import Shape
from tools.stubbed_gpu import H100, stubbed_gpu

configs.SEARCH_SPACE = {"T": (64, 128), "stages": (3, 4)}
with stubbed_gpu(compiles=False):
    for tokens in (40, 6400):
        shape = Shape(tokens, 64, 4096, dtype="bfloat16")
        found = [*tuner.candidates(shape, H100), *tuner.later(shape, H100)]
        before = set(tuner.kernels_of(shape, found, H100))
        with precompile.recording() as timed:
            tensors = tuner.make_tensors(shape, torch.device("cpu"))
            for one in found:
                tuner.call_of(one, tensors, H100)()
        assert before == set(timed)
        print(len(found), len(before))
"""


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The lines of the tuner for a number of tokens, with what each call has launched."""
    launched: list[Tile] = []
    compiled: list[str] = []

    def no_launch(kernel: object, grid: tuple[int, ...], *args: object, tile: Tile, **constants: object) -> None:
        launched.append(tile)

    def compile_all(shape: Shape, found: list[tuner.Candidate], chip: Chip) -> None:
        compiled.extend(tuner.name_of(shape, one) for one in found)

    def once(call: Call) -> float:
        launched.clear()
        call()
        return float(len(launched))

    monkeypatch.setattr(tuner, "median_us", once)
    monkeypatch.setattr(host, "launch", no_launch)
    monkeypatch.setattr(
        tuner, "compile_all", lambda shape, found, chip: compiled.extend(tuner.name_of(shape, f) for f in found)
    )
    plans.set_chip(CHIP, monkeypatch)

    def lines(tokens: int) -> list[tuple[Line, list[Tile]]]:
        programme, found = Programme(tmp_path, CPU), []
        for step in tuner.steps(programme, Shape(tokens, 24, 40, dtype="bfloat16")):
            (line,) = step.lines()
            programme._write("tiles", [{"step": step.name} | line])
            found.append((line, list(launched)))
            assert step.name in compiled or line["splits"] > 2, "of several splits the kernels do not depend on their number"
        return found

    return lines


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "stages"])
def test_every_candidate_is_launched_in_the_place_of_the_chosen_one(
    one_pass: bool, timed, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_plan = configs.forward_plan

    def plan_of(*problem: Any) -> ForwardPlan:
        plan = forward_plan(*problem)
        return replace(plan, splits=1, one_pass=(plan.one_pass or plan.shrink) if one_pass else None)

    monkeypatch.setattr(configs, "forward_plan", plan_of)
    seen: dict[str, list[bool]] = {}
    for line, launched in timed(900):
        assert Tile(**line["tile"]) in launched, line
        if line["what"].endswith("shrink"):  # shrink and mix in one kernel or, in splits, in two, and expand
            assert len(launched) == (1 if line["splits"] == 1 else 2) + 1, line
        if line["what"].endswith("one_pass"):
            assert len(launched) == 1
        seen.setdefault(line["what"], []).append(line["chosen"])
    forward = {"forward_plan.shrink", "forward_plan.one_pass" if one_pass else "forward_plan.expand"}
    assert set(seen) == forward | {"backward_plan.shrink", "backward_plan.expand", "wgrad_plan"}
    assert all(chosen[0] for what, chosen in seen.items() if not one_pass or what != "forward_plan.shrink")
    assert all(not any(chosen[1:]) for chosen in seen.values())


def test_tiles_of_the_shrink_are_tried_together_with_splits(timed) -> None:
    found = [line for line, _ in timed(5) if line["what"] == "backward_plan.shrink"]
    tried = {(line["tile"]["T"], line["splits"]) for line in found}
    assert tried >= {(t, splits) for t in configs.SEARCH_SPACE["T"] for splits in tuner.SPLITS}


def test_only_the_best_tiles_of_wgrad_are_tried_in_other_splits(monkeypatch: pytest.MonkeyPatch, timed) -> None:
    monkeypatch.setattr(tuner, "time_of", lambda call: {"us": 1.0})
    lines = [line for line, _ in timed(900) if line["what"] == "wgrad_plan"]
    first = [line for line in lines if line["first"]]
    later = [line for line in lines if not line["first"]]
    assert {str(line["tile"]) for line in later} == {str(line["tile"]) for line in first[: tuner.BEST]}
    for tile in first[: tuner.BEST]:
        assert len({line["splits"] for line in later if line["tile"] == tile["tile"]}) >= 2


def test_the_summary_names_the_fastest_tile() -> None:
    one: Line = {"what": "wgrad_plan", "tokens": 8, "chosen": True, "us": 5.0, "splits": 1, "tile": {"T": 64}}
    others = [{**one, "chosen": False, "us": us, "splits": 2, "tile": {"T": 128}} for us in (None, 4.0, 7.0)]
    elsewhere: list[Line] = [{**one, "what": "backward_plan.shrink", "chosen": False}, {"step": "one", "error": "no"}]
    assert list(tuner.summary([one, *others, *elsewhere])) == [
        "wgrad_plan, T=8: chosen 5.0 us, best 4.0 us with splits=2 T=128",
        "backward_plan.shrink, T=8: best 5.0 us with splits=1 T=64",
    ]


def test_a_tile_that_cannot_run_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(call: Call) -> float:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tuner, "median_us", cannot)
    assert tuner.time_of(lambda: None) == {"us": None, "why": "RuntimeError: out of resource: shared memory"}


def test_many_experts_are_timed_with_all_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuner, "median_us", lambda call: float(len(call())))
    (line,) = parts.of_experts(Programme(tmp_path, CPU), Shape(3, 8, 8, 16, dtype="bfloat16"), 2, "torch")
    assert (line["us"], line["num_experts"], line["top_k"]) == (4, 16, 2)  # gradients of x, A, B and the gate


def test_the_kernels_are_compiled_before() -> None:
    for line in run_compiled(COMPILED_BEFORE):
        candidates, kernels = map(int, line.split())
        assert candidates > 20
        assert kernels > 20
