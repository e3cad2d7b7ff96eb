"""Everything that needs a GPU: the `gpu` tests, the tuner, the cost of many experts, the whole suite, and sanitizers.

    python -m benchmarks.gpu [--parts tests tiles experts rows sanitizers] [--minutes 9] [--out DIR]

Writes into benchmarks/results/<device>/: tiles.jsonl, a line for each tile tried; experts.jsonl, forward + backward over E
with top_k = 2 and with all experts; and what `python -m benchmarks` writes. No speed is reported where a test fails. A line
is written as soon as it is measured; after --minutes nothing further is started, and the results so far are kept.

Estimated for 16 cores from compile times elsewhere, not measured: tests 3 minutes with pytest-xdist and 10 without, tiles 8,
experts 3, sanitizers 8; one visit of all tables of the suite 40, those of the goals first. On a machine that is available
for ten minutes at a time, with the extension built at the start of each, for its GPU alone (an H200 is 90):

    export LMOE_CUDA_ARCHS=90
    make gpu PARTS=tests MINUTES=8;  make gpu PARTS="tiles experts" MINUTES=8;  make gpu PARTS=rows MINUTES=8

It has not run on a GPU so far.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks import __main__ as suite
from benchmarks.measuring.environment import describe
from benchmarks.measuring.timing import Call, capture
from benchmarks.rows.shapes import SCALING, Shape, make_inputs, timed_backends
from lmoe_kernels import lmoe
from lmoe_kernels.backends.triton import configs, host, wgrad
from lmoe_kernels.dispatch import BACKENDS, BackendName
from lmoe_kernels.options import Options, Wanted
from tools import calls

Line = dict[str, Any]  # one of the files that are written
ROOT = Path(__file__).parents[1]
PARTS = ("tests", "tiles", "experts", "rows", "sanitizers")


def median_us(call: Call) -> float:
    """Median time of a call as a CUDA graph, without the host's part; the L2 is flushed before each."""
    milliseconds = triton.testing.do_bench(capture(lambda: call), warmup=10, rep=50, return_mode="median")
    assert isinstance(milliseconds, float)
    return 1000 * milliseconds


def tune(shape: Shape, device: torch.device) -> Iterator[Line]:
    """Time every tile of the search space in the place of each chosen one, which comes first; all other tiles are kept."""
    inputs, options = make_inputs(shape, device), Options(SCALING)
    x, dy, factors = inputs.x, inputs.dy, inputs.factors
    _, saved = calls.forward_saved("triton", x, factors, options)
    chip, only_dx = host.chip_of(device), Wanted(True, *[False] * 5)
    plans = {name: getattr(configs, name)(shape.sizes, x.dtype, chip) for name in ("forward_plan", "backward_plan")}
    timed: dict[str, Call] = {
        "forward_plan": lambda: calls.forward("triton", x, factors, options),
        "backward_plan": lambda: calls.backward("triton", dy, None, factors, saved, options, wanted=only_dx),
    }
    for name, stage in product(plans, ("one_pass", "shrink", "expand")):
        chosen = getattr(plans[name], stage, None)
        unused = name == "forward_plan" and (stage == "one_pass") != (plans[name].one_pass is not None)
        if chosen is None or unused:
            continue
        for tile in _around(chosen):
            plan = replace(plans[name], **{stage: tile})
            yield _timed(shape, f"{name}.{stage}", tile, tile == chosen, name, plan, timed[name])
    for name, chosen in plans.items():
        for plan in dict.fromkeys([chosen, *(_in_stages(chosen, splits) for splits in (1, 2, 4, 8))]):
            line = _timed(shape, f"{name}.splits", plan.shrink, plan == chosen, name, plan, timed[name])
            yield line | {"splits": plan.splits, "one_pass": getattr(plan, "one_pass", None) is not None}
    T, _, O, E, R, _ = shape.sizes  # noqa: E741
    chosen = configs.wgrad_plan(T, O, (E * R,), x.dtype, chip)
    v = torch.randn(T, E, R, device=device, dtype=x.dtype)
    cuts = product(_around(chosen.tile), dict.fromkeys((chosen.splits, 1, 2, 4, 8)))
    for plan in dict.fromkeys(_split(T, tile, splits) for tile, splits in cuts):
        line = _timed(
            shape, "wgrad_plan", plan.tile, plan == chosen, "wgrad_plan", plan,
            lambda: wgrad.wgrad_bwd(dy, [(v, factors.lora_b)], chip),
        )  # fmt: skip
        yield line | {"splits": plan.splits}


def _in_stages(plan: Any, splits: int) -> Any:
    """The plan of a forward or a backward with a shrink in so many splits, and not in one pass."""
    return replace(plan, splits=splits, **({"one_pass": None} if hasattr(plan, "one_pass") else {}))


def _split(tokens: int, tile: configs.Tile, splits: int) -> configs.WgradPlan:
    """The tokens in at most so many splits, each of whole tiles."""
    of_split = configs.ceil_div(tokens, splits * tile.T) * tile.T
    return configs.WgradPlan(tile, configs.ceil_div(tokens, of_split), of_split)


def many_experts(tokens: int, features: int, device: torch.device) -> Iterator[Line]:
    """Forward + backward of the delta over E, two experts a token and all of them, on every backend that can."""
    for experts, top_k in product((8, 16, 32, 64, 128), (2, None)):
        shape = Shape(tokens, features, features, experts, dtype="bfloat16")
        inputs = make_inputs(shape, device)
        tensors = [t.requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b, inputs.gate_weight)]
        for name in timed_backends():
            if BACKENDS[name].why_not(shape.problem(device)) is not None:
                continue
            step = partial(_forward_backward, tensors, inputs.dy, top_k, name)
            yield {"backend": name, "top_k": top_k} | asdict(shape) | _time_of(step)


def _forward_backward(tensors: list[Tensor], dy: Tensor, top_k: int | None, backend: BackendName) -> tuple[Tensor, ...]:
    x, a, b, gate = tensors
    return torch.autograd.grad(lmoe(x, a, b, gate_weight=gate, top_k=top_k, backend=backend), tensors, dy)


def _around(chosen: configs.Tile) -> list[configs.Tile]:
    space = configs.SEARCH_SPACE
    tiles = [replace(chosen, **dict(zip(space, values, strict=True))) for values in product(*space.values())]
    return list(dict.fromkeys([chosen, *tiles]))


def _timed(shape: Shape, what: str, tile: configs.Tile, chosen: bool, name: str, plan: object, call: Call) -> Line:
    """Time a call with another plan in the place of the one that the function of that name makes."""
    line: Line = {"what": what, "chosen": chosen} | asdict(shape) | {"tile": asdict(tile)}
    with mock.patch.object(configs, name, return_value=plan):
        return line | _time_of(call)


def _time_of(call: Call) -> Line:
    """The time of a call, or why there is none: a tile or backend that fails must not end the run."""
    try:
        return {"us": median_us(call)}
    except Exception as error:  # too much shared memory, an assembler that gives up, a capture that fails
        return {"us": None, "why": f"{type(error).__name__}: {error}"[:300]}


def _write(path: Path, lines: Iterator[Line], device: torch.device, end: float) -> None:
    """The machine, then each line as it is measured, until the time is up; the terminal shows the chosen tiles only."""
    with path.open("w") as file:
        print(json.dumps(describe(device)), file=file, flush=True)
        for line in lines:
            print(json.dumps(line), file=file, flush=True)
            if line.get("chosen", True):
                print(json.dumps(line), flush=True)
            if time.monotonic() > end:
                print(f"benchmarks.gpu: {path.name} ends here, the time is up", file=sys.stderr)
                break


def _pytest(choice: str, end: float) -> int:
    """Run some of the tests, in parallel with pytest-xdist: they spend most of their time in compilers, one core each."""
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
    """Run one part; 0 where it succeeded."""
    device = torch.device("cuda", torch.cuda.current_device())
    if part == "tests":
        return _pytest("not sanitizer", end)
    if part == "sanitizers":
        return _pytest("sanitizer", end)
    if part == "rows":
        minutes = max(1, int((end - time.monotonic()) / 60)) if args.minutes else None
        return suite.main(["--out", str(folder), *(["--minutes", str(minutes)] if minutes else [])])
    if part == "tiles":
        shapes = [Shape(tokens, args.features, args.features, dtype="bfloat16") for tokens in args.tokens]
        _write(folder / "tiles.jsonl", (line for shape in shapes for line in tune(shape, device)), device, end)
    else:
        _write(folder / "experts.jsonl", many_experts(8192, args.features, device), device, end)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    parser.add_argument("--minutes", type=int, default=0, help="start nothing further after so many; default: no limit")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 512, 16], help="numbers of tokens for the tuner")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts in their order; 1 where one failed. After failed tests no further part is run."""
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
