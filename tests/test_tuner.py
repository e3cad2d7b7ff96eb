"""What `make gpu` times, on CPU tensors and without a clock: that it is what its rows name."""

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
        seen.setdefault(row["what"], []).append(row["chosen"])
    assert set(seen) >= {"backward_plan.shrink", "backward_plan.expand", "wgrad_plan"} | {
        f"forward_plan.{s}" for s in stages
    }
    assert all(chosen[0] and not any(chosen[1:]) for chosen in seen.values())


def test_many_experts_are_timed_on_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "median_us", lambda call: float(len(call())))
    monkeypatch.setattr(gpu, "BACKENDS", {name: gpu.BACKENDS[name] for name in ("cuda", "torch", "reference")})
    rows = list(gpu.many_experts(3, 8, torch.device("cpu")))
    assert {row["backend"] for row in rows} == {"torch"}  # cuda cannot take CPU tensors, the reference is not timed
    assert [(row["E"], row["top_k"]) for row in rows] == [(e, k) for e in (8, 16, 32, 64, 128) for k in (2, None)]
    assert all(row["us"] == 4 for row in rows)  # gradients of x, A, B and the gate
