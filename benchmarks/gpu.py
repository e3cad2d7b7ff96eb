"""What a GPU is wanted for: the `gpu` tests, then the tuner, then the layer beside its frozen linear.

    python -m benchmarks.gpu [--skip-tests] [--tokens 16 512 8192] [--features 4096]

Writes benchmarks/results/<device>/triton_tiles.jsonl, a line for each tile tried, and triton_layer.jsonl. No speed is
reported where a test fails. Was never run so far: no GPU was at hand when it was written.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from lmoe_kernels import lmoe_linear
from lmoe_kernels.backends.triton import configs
from lmoe_kernels.backends.triton.launch import chip_of, sizes_of

Row = dict[str, Any]
E, R = 8, 16
ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Shape:
    """Tokens, and features of the layer."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741


def median_us(function: Callable[[], object]) -> float:
    """Median time of a call, the L2 flushed before each."""
    milliseconds = triton.testing.do_bench(function, warmup=25, rep=100, return_mode="median")
    assert isinstance(milliseconds, float)
    return 1000 * milliseconds


def tune(shape: Shape) -> Iterator[Row]:
    """Time every tile of the search space in the place of each chosen one, the others left as they are."""
    forward, backward = (import_module(f"lmoe_kernels.backends.triton.{name}") for name in ("forward", "backward"))
    x, a, b, gate = _tensors(shape)
    dy = torch.randn(shape.T, shape.O, device="cuda", dtype=x.dtype)
    _, logits, u = forward.forward(x, a, b, gate, None, None, 1.0, "factors", None, True)
    sizes, chip = sizes_of(x, a, b), chip_of(x.device)
    plans = {
        "forward_plan": configs.forward_plan(sizes, x.dtype, chip),
        "backward_plan": configs.backward_plan(sizes, x.dtype, chip),
    }
    calls = {
        "forward_plan": lambda: forward.forward(x, a, b, gate, None, None, 1.0, "factors", None, True),
        "backward_plan": lambda: backward.backward(
            dy, None, x, a, b, gate, logits, u, 1.0, "factors", None, (True, False, False, False)
        ),
    }
    for name, stage in product(plans, ("one_pass", "shrink", "expand")):
        chosen = getattr(plans[name], stage, None)
        unused = name == "forward_plan" and (stage == "one_pass") != (plans[name].one_pass is not None)
        if chosen is None or unused:
            continue
        for tile in _around(chosen):
            with mock.patch.object(configs, name, return_value=replace(plans[name], **{stage: tile})):
                row = _timed(shape, f"{name}.{stage}", tile, tile == chosen, calls[name])
            yield row
    chosen = configs.wgrad_plan(shape.T, shape.O, [E * R], x.dtype, chip)
    v = torch.randn(shape.T, E, R, device="cuda", dtype=x.dtype)
    for tile, splits in product(_around(chosen.tile), (1, 2, 4, 8)):
        tokens = -(-shape.T // (splits * tile.T)) * tile.T
        plan = configs.WgradPlan(tile, -(-shape.T // tokens), tokens)
        with mock.patch.object(configs, "wgrad_plan", return_value=plan):
            row = _timed(shape, "wgrad_plan", tile, plan == chosen, lambda: backward.wgrad(dy, [(v, b)], 1.0, chip))
            yield row | {"splits": plan.splits}


def _around(tile: configs.Tile) -> Iterator[configs.Tile]:
    for values in product(*configs.SEARCH_SPACE.values()):
        yield replace(tile, **dict(zip(configs.SEARCH_SPACE, values, strict=True)))


def _timed(shape: Shape, what: str, tile: configs.Tile, chosen: bool, call: Callable[[], object]) -> Row:
    row: Row = {"what": what, "chosen": chosen} | asdict(shape) | {"tile": asdict(tile)}
    try:
        return row | {"us": median_us(call)}
    except triton.runtime.errors.OutOfResources as error:
        return row | {"us": None, "why": str(error)}


def layer(shape: Shape) -> Iterator[Row]:
    """Forward and forward + backward of the layer in each backend, and of the frozen linear alone."""
    x, a, b, gate = _tensors(shape)
    weight = torch.randn(shape.O, shape.I, device="cuda", dtype=x.dtype) * shape.I**-0.5
    leaves = [t.requires_grad_() for t in (x, a, b, gate)]
    dy = torch.randn(shape.T, shape.O, device="cuda", dtype=x.dtype)

    def of_backend(name: str) -> Callable[[], Any]:
        return lambda: lmoe_linear(x, weight, None, a, b, gate_weight=gate, backend=name)

    calls: dict[str, Callable[[], Any]] = {"frozen linear": lambda: torch.nn.functional.linear(x, weight)}
    calls |= {name: of_backend(name) for name in ("torch", "triton")}
    for name, call in calls.items():
        wanted = leaves[:1] if name == "frozen linear" else leaves
        both = median_us(lambda call=call, wanted=wanted: torch.autograd.grad(call(), wanted, dy))
        with torch.no_grad():
            alone = median_us(call)
        yield {"layer": name} | asdict(shape) | {"forward_us": alone, "forward_backward_us": both}


def _tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def draw(*size: int) -> Tensor:
        return (torch.randn(size, device="cuda") * size[-1] ** -0.5).bfloat16()

    return draw(shape.T, shape.I), draw(E, R, shape.I), draw(E, R, shape.O), draw(E, shape.I)


def main() -> int:
    """Run the tests, tune, measure, write."""
    parser = argparse.ArgumentParser(description="Test, tune and measure the Triton kernels on this GPU.")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 512, 8192])
    parser.add_argument("--features", type=int, default=4096)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device")
        return 1
    if not args.skip_tests:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], check=False)
        if tests.returncode:
            return tests.returncode
    results = ROOT / "results" / torch.cuda.get_device_name().replace(" ", "_")
    results.mkdir(parents=True, exist_ok=True)
    shapes = [Shape(tokens, args.features, args.features) for tokens in args.tokens]
    for name, measure in (("triton_layer", layer), ("triton_tiles", tune)):
        with (results / f"{name}.jsonl").open("w") as file:
            for row in (row for shape in shapes for row in measure(shape)):
                print(json.dumps(row), file=file, flush=True)
                if row.get("chosen", True):
                    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
