"""What a GPU is wanted for: the `gpu` tests, then the tuner, the cost of many experts, then the whole suite.

    python -m benchmarks.gpu [--skip-tests] [--tokens 16 512 8192] [--features 4096]

Writes into benchmarks/results/<device>/: tiles.jsonl, a line for each tile tried; experts.jsonl, forward + backward over E
with top_k = 2 and with all experts; and what `python -m benchmarks` writes. No speed is reported where a test fails. Was
never run on a GPU so far: none was at hand when it was written.
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

from benchmarks import __main__ as suite
from benchmarks.environment import describe
from lmoe_kernels import lmoe
from lmoe_kernels.backends.triton import configs
from lmoe_kernels.backends.triton.launch import chip_of, sizes_of
from lmoe_kernels.dispatch import BACKENDS, Problem

Row = dict[str, Any]
Call = Callable[[], object]
E, R = 8, 16
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """Tokens, and features of the layer."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741


def median_us(call: Call) -> float:
    """Median time of a call, the L2 flushed before each."""
    milliseconds = triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median")
    assert isinstance(milliseconds, float)
    return 1000 * milliseconds


def tune(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Time every tile of the search space in the place of each chosen one, which comes first; the others stay."""
    forward, backward = (import_module(f"lmoe_kernels.backends.triton.{name}") for name in ("forward", "backward"))
    x, dy, a, b, gate = _tensors(shape, device)
    _, logits, u = forward.forward(x, a, b, gate, None, None, 1.0, "factors", None, True)
    sizes, chip = sizes_of(x, a, b), chip_of(x.device)
    plans = {name: getattr(configs, name)(sizes, x.dtype, chip) for name in ("forward_plan", "backward_plan")}
    calls: dict[str, Call] = {
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
            plan = replace(plans[name], **{stage: tile})
            yield _timed(shape, f"{name}.{stage}", tile, tile == chosen, name, plan, calls[name])
    chosen = configs.wgrad_plan(shape.T, shape.O, (E * R,), x.dtype, chip)
    v = torch.randn(shape.T, E, R, device=device, dtype=x.dtype)

    def wgrad() -> object:
        return backward.wgrad(dy, [(v, b)], 1.0, chip)

    cuts = product(_around(chosen.tile), dict.fromkeys((chosen.splits, 1, 2, 4, 8)))
    for plan in dict.fromkeys(_split(shape.T, tile, splits) for tile, splits in cuts):
        row = _timed(shape, "wgrad_plan", plan.tile, plan == chosen, "wgrad_plan", plan, wgrad)
        yield row | {"splits": plan.splits}


def _split(tokens: int, tile: configs.Tile, splits: int) -> configs.WgradPlan:
    """At most so many parts, each of whole tiles."""
    part = -(-tokens // (splits * tile.T)) * tile.T
    return configs.WgradPlan(tile, -(-tokens // part), part)


def many_experts(tokens: int, features: int, device: torch.device) -> Iterator[Row]:
    """Forward + backward of the delta over E, two experts a token and all of them, on every backend that can."""
    for experts, top_k in product((8, 16, 32, 64, 128), (2, None)):
        x, dy, a, b, gate = _tensors(Shape(tokens, features, features), device, experts)
        leaves = [t.requires_grad_() for t in (x, a, b, gate)]
        for backend in BACKENDS.values():
            problem = Problem(device, x.dtype, tokens, features, features, experts, R)
            if backend.name == "reference" or backend.why_not(problem) is not None:
                continue

            def step(name: str = backend.name, top_k: int | None = top_k, tensors: list[Tensor] = leaves, dy: Tensor = dy):
                x, a, b, gate = tensors
                return torch.autograd.grad(lmoe(x, a, b, gate_weight=gate, top_k=top_k, backend=name), tensors, dy)

            yield {"backend": backend.name, "E": experts, "R": R, "top_k": top_k, "T": tokens, "us": median_us(step)}


def _around(chosen: configs.Tile) -> list[configs.Tile]:
    space = configs.SEARCH_SPACE
    tiles = [replace(chosen, **dict(zip(space, values, strict=True))) for values in product(*space.values())]
    return list(dict.fromkeys([chosen, *tiles]))


def _timed(shape: Shape, what: str, tile: configs.Tile, chosen: bool, name: str, plan: object, call: Call) -> Row:
    """Time a call whose plan of that name is another one."""
    row: Row = {"what": what, "chosen": chosen} | asdict(shape) | {"tile": asdict(tile)}
    try:
        with mock.patch.object(configs, name, return_value=plan):
            return row | {"us": median_us(call)}
    except triton.runtime.errors.OutOfResources as error:
        return row | {"us": None, "why": str(error)}


def _tensors(shape: Shape, device: torch.device, experts: int = E) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def draw(*size: int) -> Tensor:
        return (torch.randn(size, device=device) * size[-1] ** -0.5).bfloat16()

    x, dy = draw(shape.T, shape.I), draw(shape.T, shape.O)
    return x, dy, draw(experts, R, shape.I), draw(experts, R, shape.O), draw(experts, shape.I)


def _write(path: Path, rows: Iterator[Row], device: torch.device) -> None:
    """The machine, then a line a row as it comes; on the terminal without the tiles that are not chosen."""
    with path.open("w") as file:
        print(json.dumps(describe(device)), file=file, flush=True)
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
            if row.get("chosen", True):
                print(json.dumps(row), flush=True)


def main() -> int:
    """Run the tests, tune, measure, write."""
    parser = argparse.ArgumentParser(description="Test, tune and measure the kernels on this GPU.")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[16, 512, 8192], help="that the tuner takes; none: no tuning"
    )
    parser.add_argument("--features", type=int, default=4096)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device")
        return 1
    if not args.skip_tests:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], check=False)
        if tests.returncode:
            return tests.returncode
    device = torch.device("cuda", torch.cuda.current_device())
    folder = RESULTS / torch.cuda.get_device_name(device).lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [Shape(tokens, args.features, args.features) for tokens in args.tokens]
    _write(folder / "tiles.jsonl", (row for shape in shapes for row in tune(shape, device)), device)
    _write(folder / "experts.jsonl", many_experts(8192, args.features, device), device)
    return suite.main(["--out", str(folder)])


if __name__ == "__main__":
    sys.exit(main())
