"""What `make gpu` times, on CPU tensors and without a clock: the calls are those that its lines name."""

import json
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu
from benchmarks.measuring.timing import Call
from benchmarks.rows.shapes import Shape
from lmoe_kernels import dispatch
from lmoe_kernels.backends.triton import configs, host
from tests import plans

CHIP = configs.Chip("sm_90", 8, 227 << 10)


@pytest.fixture
def only_backends() -> Iterator[Callable[..., None]]:
    """Keeps these backends in the table until the test ends, and then restores its order, which decides the choice."""
    table = dict(dispatch.BACKENDS)

    def keep(*names: str) -> None:
        for name in table.keys() - set(names):
            del dispatch.BACKENDS[name]

    yield keep
    dispatch.BACKENDS.clear()
    dispatch.BACKENDS.update(table)


@pytest.mark.parametrize("tokens, stages", [(5, {"shrink"}), (900, {"one_pass"})], ids=["two kernels", "one pass"])
def test_every_tile_is_launched_in_the_place_of_the_chosen_one(
    tokens: int, stages: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[configs.Tile] = []

    def once(call: Call) -> float:
        launched.clear()
        call()
        return 1.0

    def no_launch(kernel: object, grid: tuple[int, ...], *args: object, tile: configs.Tile, **constants: object) -> None:
        launched.append(tile)

    monkeypatch.setattr(gpu, "median_us", once)
    monkeypatch.setattr(host, "launch", no_launch)
    plans.set_chip(CHIP, monkeypatch)
    seen: dict[str, list[bool]] = {}
    for line in gpu.tune(Shape(tokens, 24, 40, dtype="bfloat16"), torch.device("cpu")):
        assert configs.Tile(**line["tile"]) in launched, line
        if line["what"].endswith(".splits"):
            # one pass; or shrink and mix in one kernel, or in two, and in a forward expand
            kernels = 1 if line["one_pass"] else (1 if line["splits"] == 1 else 2) + 1
            assert len(launched) == kernels
        seen.setdefault(line["what"], []).append(line["chosen"])
    backward = {"backward_plan.shrink", "backward_plan.expand", "backward_plan.splits", "wgrad_plan"}
    assert set(seen) >= backward | {"forward_plan.splits"} | {f"forward_plan.{s}" for s in stages}
    assert all(chosen[0] and not any(chosen[1:]) for chosen in seen.values())


def test_a_tile_that_cannot_run_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, only_backends) -> None:
    def cannot(call: Call) -> float:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gpu, "median_us", cannot)
    only_backends("torch")
    lines = list(gpu.many_experts(3, 8, torch.device("cpu")))
    assert [line["us"] for line in lines] == [None] * 10
    assert {line["why"] for line in lines} == {"RuntimeError: out of resource: shared memory"}


@pytest.mark.parametrize(
    "arguments, failing, ran, code",
    [
        ([], "", ["tests", "tiles", "experts", "rows", "sanitizers"], 0),
        ([], "tests", ["tests"], 1),
        ([], "tiles", ["tests", "tiles", "experts", "rows", "sanitizers"], 1),
        (["--parts", "rows", "tiles"], "", ["tiles", "rows"], 0),
        (["--minutes", "3"], "", ["tests", "tiles"], 1),  # a part takes two of them
    ],
)
def test_parts(
    arguments: list[str], failing: str, ran: list[str], code: int, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def run(part: str, *rest: object) -> int:
        done.append(part)
        return int(part == failing)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 120.0 * len(done))
    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main([*arguments, "--out", str(tmp_path / "new")]) == code
    assert done == ran


def test_lines_end_with_the_time_and_are_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict] = []

    def lines():
        for i in range(5):
            written.append({"us": i})
            yield written[-1]

    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(len(written)))
    gpu._write(tmp_path / "tiles.jsonl", lines(), torch.device("cpu"), 1.5)
    machine, *kept = map(json.loads, (tmp_path / "tiles.jsonl").read_text().splitlines())
    assert "packages" in machine
    assert kept == [{"us": 0}, {"us": 1}]


def test_many_experts_are_timed_on_every_backend(monkeypatch: pytest.MonkeyPatch, only_backends) -> None:
    monkeypatch.setattr(gpu, "median_us", lambda call: float(len(call())))
    only_backends("cuda", "torch", "reference")
    lines = list(gpu.many_experts(3, 8, torch.device("cpu")))
    assert {line["backend"] for line in lines} == {"torch"}  # cuda cannot take CPU tensors, the reference is not timed
    assert [(line["num_experts"], line["top_k"]) for line in lines] == [
        (e, k) for e in (8, 16, 32, 64, 128) for k in (2, None)
    ]
    assert all(line["us"] == 4 for line in lines)  # gradients of x, A, B and the gate
