"""What `make gpu` times, on CPU tensors and without a clock: that it is what its rows name."""

import json
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu
from lmoe_kernels.backends.triton import configs

CHIP = configs.Chip("sm_90", 8, 227 << 10)


@pytest.mark.parametrize("tokens, stages", [(5, {"shrink"}), (900, {"one_pass"})], ids=["two kernels", "one pass"])
def test_every_tile_is_launched_in_the_place_of_the_chosen_one(
    tokens: int, stages: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[configs.Tile] = []

    def once(call: gpu.Call) -> float:
        launched.clear()
        call()
        return 1.0

    def no_launch(kernel: object, grid: tuple[int, ...], *args: object, tile: configs.Tile, **constants: object) -> None:
        launched.append(tile)

    monkeypatch.setattr(gpu, "median_us", once)
    for name in ("forward", "backward"):
        module = import_module(f"lmoe_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "launch", no_launch)
        monkeypatch.setattr(module, "chip_of", lambda device: CHIP)
    monkeypatch.setattr(gpu, "chip_of", lambda device: CHIP)
    seen: dict[str, list[bool]] = {}
    for row in gpu.tune(gpu.Shape(tokens, 24, 40), torch.device("cpu")):
        assert configs.Tile(**row["tile"]) in launched, row
        if row["what"].endswith(".splits"):
            # one pass; or shrink and mix in one kernel, or in two, and in a forward expand
            kernels = 1 if row["one_pass"] else (1 if row["splits"] == 1 else 2) + 1
            assert len(launched) == kernels
        seen.setdefault(row["what"], []).append(row["chosen"])
    backward = {"backward_plan.shrink", "backward_plan.expand", "backward_plan.splits", "wgrad_plan"}
    assert set(seen) >= backward | {"forward_plan.splits"} | {f"forward_plan.{s}" for s in stages}
    assert all(chosen[0] and not any(chosen[1:]) for chosen in seen.values())


def test_a_tile_that_cannot_run_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(call: gpu.Call) -> float:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gpu, "median_us", cannot)
    monkeypatch.setattr(gpu, "BACKENDS", {"torch": gpu.BACKENDS["torch"]})
    rows = list(gpu.many_experts(3, 8, torch.device("cpu")))
    assert [row["us"] for row in rows] == [None] * 10
    assert {row["why"] for row in rows} == {"RuntimeError: out of resource: shared memory"}


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


def test_rows_end_with_the_time_and_are_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict] = []

    def rows():
        for i in range(5):
            written.append({"us": i})
            yield written[-1]

    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(len(written)))
    gpu._write(tmp_path / "tiles.jsonl", rows(), torch.device("cpu"), 1.5)
    machine, *kept = map(json.loads, (tmp_path / "tiles.jsonl").read_text().splitlines())
    assert "packages" in machine
    assert kept == [{"us": 0}, {"us": 1}]


def test_many_experts_are_timed_on_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "median_us", lambda call: float(len(call())))
    monkeypatch.setattr(gpu, "BACKENDS", {name: gpu.BACKENDS[name] for name in ("cuda", "torch", "reference")})
    rows = list(gpu.many_experts(3, 8, torch.device("cpu")))
    assert {row["backend"] for row in rows} == {"torch"}  # cuda cannot take CPU tensors, the reference is not timed
    assert [(row["E"], row["top_k"]) for row in rows] == [(e, k) for e in (8, 16, 32, 64, 128) for k in (2, None)]
    assert all(row["us"] == 4 for row in rows)  # gradients of x, A, B and the gate
