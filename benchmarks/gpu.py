"""What a GPU is wanted for: the `gpu` tests, then the tuner, the cost of many experts, the whole suite, and sanitizers.

    python -m benchmarks.gpu [--parts tests tiles experts rows sanitizers] [--minutes 9] [--out DIR]

Writes into benchmarks/results/<device>/: tiles.jsonl, a line for each tile tried; experts.jsonl, forward + backward over E
with top_k = 2 and with all experts; and what `python -m benchmarks` writes. No speed is reported where a test fails. A line
is written as soon as it is known, and after --minutes nothing further is begun and what there is of the suite is written.

Guessed for 16 cores from the time of compiling elsewhere, with nothing run: tests 3 minutes with pytest-xdist and 10
without, tiles 8, experts 3, sanitizers 8; one visit of all tables of the suite 40, those of the goals first. On a machine
that is lent for ten minutes at a time, with the extension built at the start of each, for its GPU alone (an H200 is 90):

    export LMOE_CUDA_ARCHS=90
    make gpu PARTS=tests MINUTES=8;  make gpu PARTS="tiles experts" MINUTES=8;  make gpu PARTS=rows MINUTES=8

Was never run on a GPU so far: none was at hand when it was written.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks import __main__ as suite
from benchmarks.environment import describe
from benchmarks.timing import capture
from lmoe_kernels import lmoe
from lmoe_kernels.backends.triton import configs
from lmoe_kernels.backends.triton.launch import chip_of, sizes_of
from lmoe_kernels.dispatch import BACKENDS, Problem

Row = dict[str, Any]
Call = Callable[[], object]
E, R = 8, 16
ROOT = Path(__file__).parents[1]
PARTS = ("tests", "tiles", "experts", "rows", "sanitizers")


@dataclass(frozen=True)
class Shape:
    """Tokens, and features of the layer."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741


def median_us(call: Call) -> float:
    """Median time of a call as a CUDA graph, which leaves the host's part out; the L2 is flushed before each."""
    milliseconds = triton.testing.do_bench(capture(lambda: call), warmup=10, rep=50, return_mode="median")
    assert isinstance(milliseconds, float)
    return 1000 * milliseconds


def tune(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Time every tile of the search space in the place of each chosen one, which comes first; the others stay."""
    forward, backward = (import_module(f"lmoe_kernels.backends.triton.{name}") for name in ("forward", "backward"))
    x, dy, a, b, gate = _tensors(shape, device)
    _, logits, u = forward.forward(x, a, b, gate, None, None, 1.0, "factors", None, True, True)
    sizes, chip = sizes_of(x, a, b), chip_of(x.device)
    plans = {name: getattr(configs, name)(sizes, x.dtype, chip) for name in ("forward_plan", "backward_plan")}
    calls: dict[str, Call] = {
        "forward_plan": lambda: forward.forward(x, a, b, gate, None, None, 1.0, "factors", None, True, True),
        "backward_plan": lambda: backward.backward(
            dy, None, x, a, b, gate, logits, u, 1.0, "factors", None, True, (True, False, False, False)
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
    for name, chosen in plans.items():
        for plan in dict.fromkeys([chosen, *(_in_stages(chosen, splits) for splits in (1, 2, 4, 8))]):
            row = _timed(shape, f"{name}.splits", plan.shrink, plan == chosen, name, plan, calls[name])
            yield row | {"splits": plan.splits, "one_pass": getattr(plan, "one_pass", None) is not None}
    chosen = configs.wgrad_plan(shape.T, shape.O, (E * R,), x.dtype, chip)
    v = torch.randn(shape.T, E, R, device=device, dtype=x.dtype)

    def wgrad() -> object:
        return backward.wgrad(dy, [(v, b)], 1.0, chip)

    cuts = product(_around(chosen.tile), dict.fromkeys((chosen.splits, 1, 2, 4, 8)))
    for plan in dict.fromkeys(_split(shape.T, tile, splits) for tile, splits in cuts):
        row = _timed(shape, "wgrad_plan", plan.tile, plan == chosen, "wgrad_plan", plan, wgrad)
        yield row | {"splits": plan.splits}


def _in_stages(plan: Any, splits: int) -> Any:
    """The plan of a forward or a backward with so many parts of the shrink, and not in one pass."""
    return replace(plan, splits=splits, **({"one_pass": None} if hasattr(plan, "one_pass") else {}))


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

            yield {"backend": backend.name, "E": experts, "R": R, "top_k": top_k, "T": tokens} | _time_of(step)


def _around(chosen: configs.Tile) -> list[configs.Tile]:
    space = configs.SEARCH_SPACE
    tiles = [replace(chosen, **dict(zip(space, values, strict=True))) for values in product(*space.values())]
    return list(dict.fromkeys([chosen, *tiles]))


def _timed(shape: Shape, what: str, tile: configs.Tile, chosen: bool, name: str, plan: object, call: Call) -> Row:
    """Time a call whose plan of that name is another one."""
    row: Row = {"what": what, "chosen": chosen} | asdict(shape) | {"tile": asdict(tile)}
    with mock.patch.object(configs, name, return_value=plan):
        return row | _time_of(call)


def _time_of(call: Call) -> Row:
    """The time of a call, or why there is none: what one tile or backend cannot do must not end the run."""
    try:
        return {"us": median_us(call)}
    except Exception as error:  # too much shared memory, an assembler that gives up, a capture that fails
        return {"us": None, "why": f"{type(error).__name__}: {error}"[:300]}


def _tensors(shape: Shape, device: torch.device, experts: int = E) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def draw(*size: int) -> Tensor:
        return (torch.randn(size, device=device) * size[-1] ** -0.5).bfloat16()

    x, dy = draw(shape.T, shape.I), draw(shape.T, shape.O)
    return x, dy, draw(experts, R, shape.I), draw(experts, R, shape.O), draw(experts, shape.I)


def _write(path: Path, rows: Iterator[Row], device: torch.device, end: float) -> None:
    """The machine, then a line a row as it comes, none after the end; on the terminal without the tiles not chosen."""
    with path.open("w") as file:
        print(json.dumps(describe(device)), file=file, flush=True)
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
            if row.get("chosen", True):
                print(json.dumps(row), flush=True)
            if time.monotonic() > end:
                print(f"benchmarks.gpu: {path.name} ends here, the time is up", file=sys.stderr)
                break


def _pytest(choice: str, end: float) -> int:
    """Run some of the tests, several at a time where pytest can: most of their time goes into compiling, on one core."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-k", choice, "tests/gpu/test_gpu.py"]
    if find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    left = None if end == float("inf") else max(1.0, end - time.monotonic())
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=left).returncode
    except subprocess.TimeoutExpired:
        print("benchmarks.gpu: the time was up before the tests were done", file=sys.stderr)
        return 1


def run(part: str, folder: Path, args: argparse.Namespace, end: float) -> int:
    """Do one part; 0 where all went well."""
    device = torch.device("cuda", torch.cuda.current_device())
    if part == "tests":
        return _pytest("not sanitizer", end)
    if part == "sanitizers":
        return _pytest("sanitizer", end)
    if part == "rows":
        minutes = max(1, int((end - time.monotonic()) / 60)) if args.minutes else None
        return suite.main(["--out", str(folder), *(["--minutes", str(minutes)] if minutes else [])])
    if part == "tiles":
        shapes = [Shape(tokens, args.features, args.features) for tokens in args.tokens]
        _write(folder / "tiles.jsonl", (row for shape in shapes for row in tune(shape, device)), device, end)
    else:
        _write(folder / "experts.jsonl", many_experts(8192, args.features, device), device, end)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    parser.add_argument("--minutes", type=int, default=0, help="begin nothing further after so many; default: no limit")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 512, 16], help="that the tuner takes")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts in their order; 1 where one failed, and then, after failed tests, no further one."""
    args = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device")
        return 1
    begun = time.monotonic()
    end = begun + 60 * args.minutes if args.minutes else float("inf")
    folder = args.out or ROOT / "benchmarks" / "results" / torch.cuda.get_device_name().lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in (part for part in PARTS if part in args.parts):
        if time.monotonic() > end:
            print(f"benchmarks.gpu: no time is left for {part}", file=sys.stderr)
            failed.append(part)
            continue
        start = time.monotonic()
        if run(part, folder, args, end):
            failed.append(part)
        print(f"benchmarks.gpu: {part}, {(time.monotonic() - start) / 60:.1f} minutes", file=sys.stderr)
        if failed == ["tests"]:  # no speed where a result is wrong
            break
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
