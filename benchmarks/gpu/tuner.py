"""The tuner of the Triton backend: which plans are tried in the place of the chosen ones, and how long each takes."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu.programme import Line, Programme, Step, is_fatal
from benchmarks.measuring.timing import Call, capture
from benchmarks.rows.shapes import DTYPES, SCALING, Shape
from lmoe_kernels.backends.triton import configs, host, precompile, wgrad
from lmoe_kernels.backends.triton.plans import Chip, Tile, WgradPlan
from lmoe_kernels.options import Factors, Options, Saved, Wanted
from tools import calls

SPLITS = (1, 2)  # of the features, tried together with each tile
WGRAD_SPLITS = (1, 2, 4, 8)  # of the tokens, tried with the best tiles
BEST = 2
OPTIONS, ONLY_DX = Options(SCALING), Wanted(True, *[False] * 5)


class Candidate(NamedTuple):
    """A plan, and the function of `configs` in whose place it is tried."""

    what: str  # that function, and the stage whose tile is tried
    plan: Any
    tile: Tile
    splits: int
    chosen: bool

    @property
    def function(self) -> str:
        """The function's name."""
        return self.what.partition(".")[0]


class Tensors(NamedTuple):
    """The tensors of one shape, and what a forward saved."""

    x: Tensor  # (T, I)
    dy: Tensor  # (T, O)
    v: Tensor  # (T, E, R)
    factors: Factors
    saved: Saved


def candidates(shape: Shape, chip: Chip) -> Iterator[Candidate]:
    """The chosen plans and those around them, the chosen one of each stage first; of wgrad without other splits."""
    sizes, dtype = shape.sizes, DTYPES[shape.dtype]
    for function in ("forward_plan", "backward_plan"):
        chosen = getattr(configs, function)(sizes, dtype, chip)
        one_pass = getattr(chosen, "one_pass", None)
        if one_pass is not None:
            for tile in _around(one_pass):
                plan = replace(chosen, one_pass=tile)
                yield Candidate(f"{function}.one_pass", plan, tile, 1, plan == chosen)
        staged = replace(chosen, one_pass=None) if hasattr(chosen, "one_pass") else chosen
        ways = product(_around(chosen.shrink), dict.fromkeys((chosen.splits, *SPLITS)))
        for tile, splits in ways:
            plan = replace(staged, shrink=tile, splits=splits)
            yield Candidate(f"{function}.shrink", plan, tile, splits, plan == chosen)
        if one_pass is None:
            for tile in _around(chosen.expand):
                yield Candidate(
                    f"{function}.expand", replace(chosen, expand=tile), tile, chosen.splits, tile == chosen.expand
                )
    chosen = _chosen_wgrad(shape, chip)
    for tile in _around(chosen.tile):
        yield _wgrad(shape.tokens, tile, chosen.splits, chosen)


def later(shape: Shape, chip: Chip) -> list[Candidate]:
    """Candidates with the kernels of all that `in_splits` can yield, which do not depend on the number of several splits."""
    chosen = _chosen_wgrad(shape, chip)
    return [_wgrad(shape.tokens, tile, splits, chosen) for tile, splits in product(_around(chosen.tile), WGRAD_SPLITS[:2])]


def in_splits(shape: Shape, chip: Chip, timed: Iterable[Line]) -> Iterator[Candidate]:
    """The fastest tiles of wgrad in other splits of the tokens."""
    lines = [line for line in timed if line["what"] == "wgrad_plan" and line["us"] is not None and line["first"]]
    best = sorted(lines, key=lambda line: line["us"])[:BEST]
    chosen = _chosen_wgrad(shape, chip)
    for line, splits in product(best, WGRAD_SPLITS):
        candidate = _wgrad(shape.tokens, Tile(**line["tile"]), splits, chosen)
        if candidate.splits != line["splits"]:
            yield candidate


def steps(programme: Programme, shape: Shape) -> Iterator[Step]:
    """A step for each candidate. Their kernels are compiled before the first, in processes that leave the GPU alone."""
    chip = host.chip_of(programme.device)
    first = {name_of(shape, one): one for one in candidates(shape, chip)}
    left = first.keys() - {line["step"] for line in programme.lines("tiles")}
    if left and programme.seconds_left() > 0:
        compile_all(shape, [one for name, one in first.items() if name in left] + later(shape, chip), chip)
    tensors = cache(partial(make_tensors, shape, programme.device))
    for name, one in first.items():
        yield Step(name, partial(_timed, shape, one, tensors, chip, first=True))
    timed = [line for line in programme.lines("tiles") if line["step"] in first]
    for one in in_splits(shape, chip, timed):
        yield Step(name_of(shape, one), partial(_timed, shape, one, tensors, chip, first=False))


def summary(lines: Iterable[Line]) -> Iterator[str]:
    """For each plan and number of tokens the chosen tile's time, and the fastest tile with its own."""
    of_plan: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        if line.get("us") is not None:
            of_plan.setdefault((line["what"], line["tokens"]), []).append(line)
    for (what, tokens), timed in of_plan.items():
        best = min(timed, key=lambda line: line["us"])
        chosen = next((f"chosen {line['us']:.1f} us, " for line in timed if line["chosen"]), "")
        tile = " ".join(f"{name}={value}" for name, value in best["tile"].items())
        yield f"{what}, T={tokens}: {chosen}best {best['us']:.1f} us with splits={best['splits']} {tile}"


def name_of(shape: Shape, one: Candidate) -> str:
    """The name of a candidate's step."""
    tile = " ".join(f"{name}={value}" for name, value in asdict(one.tile).items())
    return f"{one.what}, {shape.in_features} -> {shape.out_features}, T={shape.tokens}, splits={one.splits}, {tile}"


def compile_all(shape: Shape, found: list[Candidate], chip: Chip) -> int:
    """Compile the kernels of candidates into Triton's cache; returns their number. What cannot be compiled is not timed."""
    kernels = kernels_of(shape, found, chip)
    with precompile.Processes(precompile.most_processes(), chip) as processes:
        failures = processes.map(precompile.compile_kernel, kernels)
        for kernel, failure in zip(kernels, tqdm(failures, total=len(kernels), desc="Triton kernels"), strict=True):
            if failure is not None:
                print(f"benchmarks.gpu: {kernel.name} cannot be compiled: {failure}", file=sys.stderr)
    return len(kernels)


def kernels_of(shape: Shape, found: list[Candidate], chip: Chip) -> list[precompile.Kernel]:
    """The kernels that the candidates need and that are not loaded."""
    with precompile.recording() as kernels, mock.patch.object(host, "chip_of", return_value=chip):
        tensors = make_tensors(shape, torch.device("meta"))
        for one in found:
            call_of(one, tensors, chip)()
    return list(kernels)


def make_tensors(shape: Shape, device: torch.device) -> Tensors:
    """Random tensors of a shape; the forward runs with the chosen plan."""
    T, I, O, E, R, _ = shape.sizes  # noqa: E741
    dtype = DTYPES[shape.dtype]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=device)

    factors = Factors(draw(E, R, I), draw(E, R, O), gate_weight=draw(E, I))
    x, dy, v = draw(T, I), draw(T, O), draw(T, E, R)
    _, saved = calls.forward_saved("triton", x, factors, OPTIONS)
    return Tensors(x, dy, v, factors, saved)


def call_of(one: Candidate, tensors: Tensors, chip: Chip) -> Call:
    """The call that a candidate's plan decides, with that plan."""
    x, dy, v, factors, saved = tensors
    call: dict[str, Callable[[], object]] = {
        "forward_plan": lambda: calls.forward("triton", x, factors, OPTIONS),
        "backward_plan": lambda: calls.backward("triton", dy, None, factors, saved, OPTIONS, wanted=ONLY_DX),
        "wgrad_plan": lambda: wgrad.wgrad_bwd(dy, [(v, factors.lora_b)], chip),
    }

    def with_plan() -> object:
        with mock.patch.object(configs, one.function, return_value=one.plan):
            return call[one.function]()

    return with_plan


def median_us(call: Call) -> float:
    """Median time of a call as a CUDA graph, without the host's part; the L2 is flushed before each."""
    milliseconds = triton.testing.do_bench(capture(lambda: call), warmup=10, rep=50, return_mode="median")
    assert isinstance(milliseconds, float)
    return 1000 * milliseconds


def time_of(call: Call) -> Line:
    """The time of a call, or why there is none: a tile or backend that fails must not end the run."""
    try:
        return {"us": median_us(call)}
    except Exception as error:  # too much shared memory, an assembler that gives up, a capture that fails
        if is_fatal(str(error)):
            raise
        return {"us": None, "why": f"{type(error).__name__}: {error}"[:300]}


def _timed(shape: Shape, one: Candidate, tensors: Callable[[], Tensors], chip: Chip, *, first: bool) -> list[Line]:
    line: Line = {"what": one.what, "chosen": one.chosen, "first": first} | asdict(shape)
    return [line | {"tile": asdict(one.tile), "splits": one.splits} | time_of(call_of(one, tensors(), chip))]


def _chosen_wgrad(shape: Shape, chip: Chip) -> WgradPlan:
    T, _, O, E, R, _ = shape.sizes  # noqa: E741
    return configs.wgrad_plan(T, O, (E * R,), DTYPES[shape.dtype], chip)


def _wgrad(tokens: int, tile: Tile, splits: int, chosen: WgradPlan) -> Candidate:
    """The gradient of B with a tile, the tokens in at most so many splits, each of whole tiles."""
    of_split = configs.ceil_div(tokens, splits * tile.T) * tile.T
    plan = WgradPlan(tile, configs.ceil_div(tokens, of_split), of_split)
    return Candidate("wgrad_plan", plan, tile, plan.splits, plan == chosen)


def _around(chosen: Tile) -> list[Tile]:
    space = configs.SEARCH_SPACE
    tiles = [replace(chosen, **dict(zip(space, values, strict=True))) for values in product(*space.values())]
    return list(dict.fromkeys([chosen, *tiles]))
