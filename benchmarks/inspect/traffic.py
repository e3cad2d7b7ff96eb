"""Bytes a token that each Triton kernel loads and stores, counted in Triton's interpreter, beside the floor.

    python -m benchmarks.traffic

The tiles are those that `configs.py` chooses for an H200, on a small problem and a chip of few processors, so that as
many tokens come to a program as on the whole chip. Counted is what the kernels ask for; of A, B, u and v most comes out of
caches.
"""

from dataclasses import dataclass
from importlib import import_module
from unittest import mock

from tools.interpreter.bf16 import interpret

interpret()

import torch  # noqa: E402

from benchmarks.environment import provenance  # noqa: E402
from lmoe_kernels.backends.triton.configs import Chip  # noqa: E402
from tools.interpreter.bytes import counted, counted_flops  # noqa: E402

T, I, O, E, R = 256, 512, 768, 8, 16  # noqa: E741
PLANS = {"tokens fill the chip": 4, "tokens fill half the chip": 8, "few tokens": 64}


@dataclass(frozen=True)
class Row:
    """What a kernel asks of one tensor, in bytes a token."""

    direction: str
    kernel: str
    tensor: str
    loaded: float
    stored: float


def measure(processors: int) -> list[Row]:
    """A forward and a backward on a chip of that many processors."""
    modules = [import_module(f"lmoe_kernels.backends.triton.{name}") for name in ("forward", "backward")]
    x, dy = torch.randn(T, I).bfloat16(), torch.randn(T, O).bfloat16()
    a, b = torch.randn(E, R, I).bfloat16(), torch.randn(E, R, O).bfloat16()
    gate, dlogits = torch.randn(E, I).bfloat16(), torch.randn(T, E)
    chip = Chip("sm_90", processors, 227 << 10)
    with (
        mock.patch.object(modules[0], "chip_of", return_value=chip),
        mock.patch.object(modules[1], "chip_of", return_value=chip),
    ):
        with counted() as of_forward:
            _, logits, u = modules[0].forward(x, a, b, gate, None, None, 0.5, "factors", None, True, True)
        with counted() as of_backward:
            modules[1].backward(dy, dlogits, x, a, b, gate, logits, u, 0.5, "factors", None, True, (True,) * 4)
    names = {"x": x, "dy": dy, "lora_a": a, "lora_b": b, "gate_weight": gate, "logits": logits, "u": u}
    of_address = {t.data_ptr(): name for name, t in names.items() if t is not None}
    return [
        Row(direction, access.kernel, of_address.get(access.address, access.argument), count.loaded / T, count.stored / T)
        for direction, counts in (("forward", of_forward), ("backward", of_backward))
        for access, count in counts.items()
    ]


def measure_flops(experts: int, top_k: int) -> float:
    """FLOPs a token of a forward's dots, with as many experts."""
    forward = import_module("lmoe_kernels.backends.triton.forward")
    tokens, features = 2048, 128
    x, logits = torch.randn(tokens, features).bfloat16(), torch.randn(tokens, experts)
    a, b = torch.randn(experts, R, features).bfloat16(), torch.randn(experts, R, features).bfloat16()
    with mock.patch.object(forward, "chip_of", return_value=Chip("sm_90", 64, 227 << 10)), counted_flops() as flops:
        forward.forward(x, a, b, None, logits, None, 0.5, "factors", top_k, True, True)
    return sum(flops.values()) / tokens


def over_the_floor(rows: list[Row]) -> str:
    """What the large tensors cost, as multiples of reading or writing them once."""
    forward, backward = ([row for row in rows if row.direction == direction] for direction in ("forward", "backward"))
    written = [sum(row.stored for row in of if row.tensor in ("y", "out")) for of in (forward, backward)]
    read = {name: sum(row.loaded for row in of if row.tensor == name) for of in (forward, backward) for name in ("x", "dy")}
    read_forward = sum(row.loaded for row in forward if row.tensor == "x")
    return (
        f"over the floor: forward x {read_forward / (2 * I):.2f}, y {written[0] / (2 * O):.2f};"
        f" backward dy {read['dy'] / (2 * O):.2f}, x {read['x'] / (2 * I):.2f}, dx {written[1] / (2 * I):.2f}"
    )


def main() -> None:
    """Print a table for each plan, and the work over E."""
    print(f"counted {provenance()}\n")
    print(f"bytes a token, bf16, T={T} I={I} O={O} E={E} R={R}: x is {2 * I}, y and dy are {2 * O}, u and v are {2 * E * R}")
    for plan, processors in PLANS.items():
        print(f"\n{plan}\n{'':<9} {'kernel':<24} {'tensor':<14} {'loaded':>8} {'stored':>8}")
        rows = measure(processors)
        for row in rows:
            print(f"{row.direction:<9} {row.kernel:<24} {row.tensor:<14} {row.loaded:>8.0f} {row.stored:>8.0f}")
        print(over_the_floor(rows))
    print(f"\nFLOPs a token of the forward's dots over E at R={R}, T=2048, I=O=128")
    print(f"{'E':>4} {'all experts':>12} {'top_k=2':>9}")
    for experts in (8, 16, 32, 64, 128):
        print(f"{experts:>4} {2 * experts * R * (128 + 128):>12} {measure_flops(experts, 2):>9.0f}")


if __name__ == "__main__":
    main()
