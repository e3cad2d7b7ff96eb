"""Bytes a token that each Triton kernel loads and stores, counted in Triton's interpreter, and the least possible.

    python -m benchmarks.inspect.traffic

The tiles are those that `configs.py` chooses for an H200. The problem is small and the chip has few processors, so that each
program gets as many tokens as on the whole chip; kernels cost only their bytes, as those of large problems nearly do. All
loads and stores are counted; on a GPU most of those of A, B, u and v are served by caches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from tools.interpreter.bf16 import interpret

interpret()

import torch  # noqa: E402

from benchmarks.measuring.environment import provenance  # noqa: E402
from lmoe_kernels.backends.triton import configs, cost, host  # noqa: E402
from lmoe_kernels.backends.triton.configs import Chip  # noqa: E402
from lmoe_kernels.options import Factors, Options  # noqa: E402
from tools import calls  # noqa: E402
from tools.interpreter.bytes import counted, counted_flops  # noqa: E402

T, I, O, E, R = 256, 512, 768, 8, 16  # noqa: E741
PLANS = {"tokens fill the chip": 2, "tokens fill half the chip": 4, "few tokens": 64}  # and processors


@dataclass(frozen=True)
class Traffic:
    """What a kernel loads and stores of one tensor, in bytes a token."""

    direction: str
    kernel: str
    tensor: str
    loaded: float
    stored: float


@contextmanager
def on_chip_with(processors: int) -> Iterator[None]:
    """Plans for an H200 with so many processors, where kernels cost only their bytes."""
    chip, rates = Chip("sm_90", processors, 227 << 10), cost.H100._replace(launch=0, wave=0)
    with mock.patch.object(host, "chip_of", return_value=chip), mock.patch.object(cost, "H100", rates):
        for plan in (configs.forward_plan, configs.backward_plan):
            plan.cache_clear()
        yield


def measure(processors: int) -> list[Traffic]:
    """A forward and a backward on a chip of that many processors."""
    x, dy, dlogits = torch.randn(T, I).bfloat16(), torch.randn(T, O).bfloat16(), torch.randn(T, E)
    factors = Factors(torch.randn(E, R, I).bfloat16(), torch.randn(E, R, O).bfloat16(), torch.randn(E, I).bfloat16())
    options = Options(scaling=0.5)
    with on_chip_with(processors):
        with counted() as of_forward:
            _, saved = calls.forward_saved("triton", x, factors, options)
        with counted() as of_backward:
            calls.backward("triton", dy, x, factors, saved, options, dlogits=dlogits)
    named = {"x": x, "dy": dy, **factors._asdict(), **saved._asdict()}
    of_address = {t.data_ptr(): name for name, t in named.items() if t is not None}
    return [
        Traffic(direction, at.kernel, of_address.get(at.address, at.argument), count.loaded / T, count.stored / T)
        for direction, counts in (("forward", of_forward), ("backward", of_backward))
        for at, count in counts.items()
    ]


def measure_flops(experts: int, top_k: int) -> float:
    """FLOPs a token of a forward's dots, with as many experts."""
    tokens, features = 2048, 128
    a, b = (torch.randn(experts, R, features).bfloat16() for _ in range(2))
    x, factors = torch.randn(tokens, features).bfloat16(), Factors(a, b, gate_logits=torch.randn(tokens, experts))
    with on_chip_with(64), counted_flops() as flops:
        calls.forward("triton", x, factors, Options(scaling=0.5, top_k=top_k))
    return sum(flops.values()) / tokens


def over_the_floor(traffic: list[Traffic]) -> str:
    """The traffic of the large tensors, as multiples of loading or storing them once."""

    def loaded(direction: str, tensor: str) -> float:
        return sum(one.loaded for one in traffic if (one.direction, one.tensor) == (direction, tensor))

    def written(direction: str) -> float:
        return sum(one.stored for one in traffic if one.direction == direction and one.tensor in ("y", "out"))

    return (
        f"over the floor: forward x {loaded('forward', 'x') / (2 * I):.2f}, y {written('forward') / (2 * O):.2f};"
        f" backward dy {loaded('backward', 'dy') / (2 * O):.2f}, x {loaded('backward', 'x') / (2 * I):.2f},"
        f" dx {written('backward') / (2 * I):.2f}"
    )


def main() -> None:
    """Print a table for each plan, and the work over E."""
    print(f"counted {provenance()}\n")
    print(f"bytes a token, bf16, T={T} I={I} O={O} E={E} R={R}: x is {2 * I}, y and dy are {2 * O}, u and v are {2 * E * R}")
    for plan, processors in PLANS.items():
        print(f"\n{plan}\n{'':<9} {'kernel':<24} {'tensor':<14} {'loaded':>8} {'stored':>8}")
        traffic = measure(processors)
        for one in traffic:
            print(f"{one.direction:<9} {one.kernel:<24} {one.tensor:<14} {one.loaded:>8.0f} {one.stored:>8.0f}")
        print(over_the_floor(traffic))
    print(f"\nFLOPs a token of the forward's dots over E at R={R}, T=2048, I=O=128")
    print(f"{'E':>4} {'all experts':>12} {'top_k=2':>9}")
    for experts in (8, 16, 32, 64, 128):
        print(f"{experts:>4} {2 * experts * R * (128 + 128):>12} {measure_flops(experts, 2):>9.0f}")


if __name__ == "__main__":
    main()
