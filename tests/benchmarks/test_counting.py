"""Bytes, FLOPs and rooflines: all that is counted or computed, not timed."""

from dataclasses import replace

import pytest
import torch

from benchmarks.measuring.counting import OpCounter
from benchmarks.measuring.limits import Limits, floor_seconds
from benchmarks.measuring.memory import peak_bytes
from benchmarks.rows.shapes import Shape
from tests.benchmarks.small import CPU, LIMITS, SMALL, records


def test_bytes_and_flops_that_operations_move() -> None:
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    with OpCounter(LIMITS, "float32") as counter:
        a @ b.t().contiguous().t()
    assert counter.flops == 2 * 3 * 5 * 7
    assert counter.bytes == 4 * (2 * 35 + 15 + 35 + 21)  # the copy of b, then the product
    assert counter.seconds == pytest.approx(counter.bytes / 1e9)
    with OpCounter(LIMITS, "float32") as counter:
        c.view(21).unsqueeze(0)
    assert counter.bytes == 0
    with OpCounter(LIMITS, "float32") as counter:
        c.addmm_(a, b)
    assert counter.bytes == 4 * (21 + 15 + 35 + 21)
    with OpCounter(LIMITS, "float32") as counter:
        c.addmm_(a, b, beta=0)
    assert counter.bytes == 4 * (15 + 35 + 21)


def test_narrow_products_are_counted_at_their_own_rate() -> None:
    a, b = torch.randn(300, 200), torch.randn(200, 16)
    endless = replace(LIMITS, copy_bytes_per_s=float("inf"))
    with OpCounter(endless, "float32") as counter:
        a @ b
    assert counter.seconds == pytest.approx(2 * 300 * 200 * 16 / 1e11)
    with OpCounter(endless, "float32") as counter:
        a @ a.t()
    assert counter.seconds == pytest.approx(2 * 300 * 200 * 300 / 1e12)


def test_the_operations_of_our_backend_are_counted() -> None:
    tokens, ins, outs, experts, rank, _ = SMALL.sizes
    ranks = experts * rank
    flops = records(["torch"], phase="forward")["torch"].counted_flops
    products = 2 * tokens * (ins * outs + ranks * (ins + outs) + experts * ins)
    assert flops is not None
    assert products <= flops <= 1.1 * products  # and the mix


def test_what_is_kept_for_the_backward() -> None:
    found = records(["torch", "unsloth", "loop"], replace(SMALL, dtype="bfloat16"))
    tokens, experts, rank = SMALL.tokens, SMALL.num_experts, SMALL.rank
    assert found["torch"].saved_bytes == tokens * (4 * experts + 2 * experts * rank)
    assert found["unsloth"].saved_bytes == 0
    assert found["loop"].saved_bytes > tokens * experts * SMALL.out_features * 2


def test_peak_is_what_is_held_at_one_time() -> None:
    def call() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        second + 1

    assert peak_bytes(call, CPU) == pytest.approx(8000, abs=500)


def test_rooflines_by_hand() -> None:
    """T=1000, 100 -> 200, E R = 32, fp32, on a machine that copies one byte a second and multiplies at no cost."""
    limits = Limits(1.0, {"float32": float("inf")}, {}, 1)
    shape = Shape(1000, 100, 200, 4, 8)
    x, y, weight = 100 * 4000, 200 * 4000, 100 * 200 * 4
    parameters = 4 * (32 * 300 + 4 * 100)
    saved = 1000 * (32 * 4 + 4 * 4)

    def floor(definition: str, scope: str, phase: str) -> float:
        return floor_seconds(definition, shape, scope, phase, limits)

    assert floor("frozen", "layer", "forward") == x + y + weight
    assert floor("factors", "delta", "forward") == x + y + parameters
    assert floor("factors", "layer", "forward") == 2 * x + 3 * y + weight + parameters
    assert floor("factors", "delta", "backward") == 2 * x + y + 2 * parameters + saved
    both = floor("factors", "layer", "forward+backward")
    assert both == floor("factors", "layer", "forward") + saved + floor("factors", "layer", "backward")
