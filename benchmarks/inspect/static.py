"""Compile the Triton kernels for GPUs that this machine does not have, and read their machine code.

    python -m benchmarks.inspect.static [--quick | --one] [--arch sm_90 ...] [--out benchmarks/results/static]

One JSON line for each kernel and configuration that `configs.py` chooses for `CASES`, then a table of the kernels; `--out`
writes them to triton-<version>.jsonl and triton-<version>.txt. Triton brings its compilers along, and the code differs from
version to version: run this with each. The launches are those of the backend itself: it is called on meta tensors, and its
launcher is replaced by a recorder. Exits with 1 where there are `complaints`, with 2 where machine code cannot be read.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.inspect.machine_code import MachineCodeError, figures_of
from benchmarks.measuring.environment import provenance
from benchmarks.rows.shapes import DTYPES, Shape
from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.dropout import dropout
from lmoe_kernels.backends.triton.plans import Chip, Tile
from lmoe_kernels.backends.triton.serving import add_stacked
from lmoe_kernels.options import Block, Factors, Options, StackedFactors, TokenGroups, places_of
from tools import calls

DEFAULT = Options(scaling=0.5)
OF_Q = Block(8, 16, 4096)
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 108, 163 << 10),
        Chip("sm_86", 84, 99 << 10),
        Chip("sm_89", 128, 99 << 10),
        Chip("sm_90", 132, 227 << 10),
        Chip("sm_100", 148, 227 << 10),
        Chip("sm_120", 170, 99 << 10),
        Chip("gfx942", 304, 64 << 10),
    )
}
# Spills that are let pass, of a kernel and of a step of its loop: under Triton 3.7 ptxas spills 2 to 6 registers of a few
# kernels for sm_120, to fit one more program on a processor, and 2 in a loop of 136 instructions (2026-11-26).
FEW_SPILLS, FEW_IN_LOOP = 8, 2
TYPES = {torch.int32: "i32", torch.int64: "i64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """A call whose kernels are compiled, forward and backward."""

    shape: Shape
    options: Options = DEFAULT
    factors_dtype: str | None = None  # None: that of the shape
    shared_a: bool = False
    gate_bias: bool = False
    outside_logits: bool = False


@dataclass(frozen=True)
class Stack:
    """A call of `lmoe_stacked_` on the q, k and v of adapters, whose kernels are compiled."""

    T: int
    block: Block = OF_Q  # k and v have a quarter of its features
    adapters: int = 1
    dtype: str = "bfloat16"
    groups: bool = False
    gate_bias: bool = False
    outside_logits: bool = False
    in_features: int = 4096

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of q, k and v, adapter by adapter."""
        q, few = self.block, self.block.out_features // 4
        k = q._replace(out_features=few, column=q.out_features)
        qkv = (q, k, k._replace(column=q.out_features + few))
        return tuple(block._replace(group=group) for group in range(self.adapters) for block in qkv)


def case(T: int = 65536, E: int = 8, R: int = 16, dtype: str = "bfloat16", **more: Any) -> Case:
    """A case on 4096 features."""
    return Case(Shape(T, 4096, 4096, E, R, dtype), **more)


TOP_2, OUTPUTS, DROPOUT = (DEFAULT._replace(**change) for change in ({"top_k": 2}, {"mixing": "outputs"}, {"dropout": 0.1}))
TOP_2_OF_ALL = TOP_2._replace(renormalize=False)
# With another order of loads ptxas 12.8 got the gradients of A and of the gate wrong for sm_90 (see wgrad.py). The weight
# gradients of these calls have tiles of 128 and of 64 features.
UNALIGNED = [Case(Shape(t, i, o, 3, 9, "bfloat16")) for t, i, o in ((16384, 4104, 4104), (130, 136, 72))]
QUICK = [
    case(options=DROPOUT),
    case(T=16),
    case(T=8192, E=64, options=TOP_2),
    Stack(512, adapters=8, groups=True),
    Stack(4096, Block(4, 8, 4096)),
]
FEW_OF_OUTPUTS = Block(4, 64, 4096, mixing="outputs", top_k=2)
SHARED = Block(8, 16, 4096, shared_a=True, top_k=2, renormalize=False)
STACKS = [
    *(Stack(t, adapters=n, groups=n > 1) for t in (1, 64, 512, 8192) for n in (1, 12)),
    *(Stack(t, block, n, groups=n > 1) for t in (16, 8192) for block in (FEW_OF_OUTPUTS, SHARED) for n in (1, 4)),
    *(Stack(t, Block(128, 8, 1024, top_k=2), 2, groups=True) for t in (16, 4096)),
    *(Stack(t, Block(5, 3, 1028), 2, groups=True, in_features=2051) for t in (16, 4096)),
    *(Stack(t, adapters=n, groups=n > 1, dtype="float32") for t in (16, 4096) for n in (1, 4)),
    Stack(64, dtype="float16", gate_bias=True, outside_logits=True),
]
CASES: list[Case | Stack] = [
    *QUICK,
    *(case(T=t, E=e, R=r) for t in (16, 4096, 65536) for e, r in ((1, 16), (4, 8), (8, 32), (16, 16), (128, 8), (256, 4))),
    case(T=8192, E=128, options=OUTPUTS._replace(top_k=2)),
    *(case(T=t, E=e, options=TOP_2_OF_ALL) for t in (16, 65536) for e in (8, 64)),
    *(case(T=t, options=TOP_2_OF_ALL, shared_a=True) for t in (16, 65536)),
    *(Case(Shape(t, 2051, 1025, 5, 3, "bfloat16"), DROPOUT) for t in (16, 65536)),
    *(Case(Shape(8192, 4096, o, 8, 16, "bfloat16")) for o in (14336, 28672)),
    *(case(E=4, R=64, options=options) for options in (DEFAULT, OUTPUTS)),
    case(options=OUTPUTS),
    case(options=OUTPUTS._replace(top_k=2), outside_logits=True),
    *(case(T=t, shared_a=True, factors_dtype="float32") for t in (16, 65536)),
    *(case(T=t, dtype="float16", options=DROPOUT) for t in (16, 65536)),
    *(case(T=t, E=e, dtype="float32", options=DROPOUT) for t in (16, 65536) for e in (8, 64)),
    *(case(T=t, gate_bias=True) for t in (16, 65536)),
    case(T=8192, E=64, options=TOP_2, gate_bias=True),
    *UNALIGNED,
    *STACKS,
]


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched: all that its machine code depends on."""

    module: str
    kernel: str
    arguments: tuple[str, ...]  # "*bf16", "i32", "i32 16" where divisible by 16, "1", "fp32", "None"
    constants: tuple[tuple[str, object], ...]
    tile: Tile


class Recorded(NamedTuple):
    """A launch, and what its traffic depends on in addition."""

    launch: Launch
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # under their names, without "_ptr"


def launches(case: Case | Stack, chip: Chip) -> list[Launch]:
    """What a forward and a backward would launch on a chip, or a call on a stack, each once."""
    return list(dict.fromkeys(one.launch for one in recorded(case, chip)))


def recorded(case: Case | Stack, chip: Chip) -> list[Recorded]:
    """All that they would launch, in order."""
    found: list[Recorded] = []

    def record(kernel: triton.JITFunction, grid: tuple[int, ...], *args: object, tile: Tile, **constants: object) -> None:
        kinds = tuple(_kind(arg, p.do_not_specialize) for arg, p in zip(args, kernel.params, strict=False))
        launch = Launch(kernel.fn.__module__, kernel.fn.__name__, kinds, tuple(constants.items()), tile)
        found.append(Recorded(launch, grid, arguments_of(kernel, args)))

    with mock.patch.object(host, "launch", record), mock.patch.object(host, "chip_of", return_value=chip):
        if isinstance(case, Stack):
            _call_stack(case)
        else:
            _call(case)
    return found


def _call(case: Case) -> None:
    """The forward and the backward of a case, on tensors without memory."""
    T, I, O, E, R, _ = case.shape.sizes  # noqa: E741
    own, of_factors = DTYPES[case.shape.dtype], DTYPES[case.factors_dtype or case.shape.dtype]

    def make(*shape: int, dtype: torch.dtype = own) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    factors = Factors(
        make(1 if case.shared_a else E, R, I, dtype=of_factors),
        make(E, R, O, dtype=of_factors),
        gate_weight=None if case.outside_logits else make(E, I, dtype=of_factors),
        gate_bias=make(E, dtype=of_factors) if case.gate_bias else None,
        gate_logits=make(T, E) if case.outside_logits else None,
    )
    x, dy = make(T, I), make(T, O)
    _, saved = calls.forward_saved("triton", x, factors, case.options)
    dlogits = make(T, E, dtype=saved.router_logits(factors).dtype)
    calls.backward("triton", dy, x, factors, saved, case.options, dlogits=dlogits)
    if case.options.dropout > 0:
        dropout(x, make(dtype=torch.int64), case.options.dropout)


def _call_stack(case: Stack) -> None:
    """The call of a stack, likewise."""
    T, I, last = case.T, case.in_features, places_of(case.blocks)[-1]  # noqa: E741

    def make(*shape: int, dtype: torch.dtype = DTYPES[case.dtype]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    fp32, experts = torch.float32, last.experts.stop
    factors = StackedFactors(
        make(last.a.stop, I),
        make(last.b.stop),
        None if case.outside_logits else make(experts, I),
        make(experts, dtype=fp32) if case.gate_bias else None,
        make(T, experts, dtype=fp32) if case.outside_logits else None,
    )
    groups = TokenGroups(make(T, dtype=torch.int32), make(T, dtype=fp32)) if case.groups else None
    add_stacked(make(T, last.columns.stop), make(T, I), factors, case.blocks, groups)


def arguments_of(kernel: triton.JITFunction, args: tuple[object, ...]) -> dict[str, object]:
    """A launch's arguments under their names, without "_ptr"."""
    return {name.removesuffix("_ptr"): arg for name, arg in zip(kernel.arg_names, args, strict=False)}


def _kind(arg: object, do_not_specialize: bool) -> str:
    if isinstance(arg, Tensor):
        return "*" + TYPES[arg.dtype]
    if isinstance(arg, int):
        return "i32" if do_not_specialize else "1" if arg == 1 else "i32 16" if arg % 16 == 0 else "i32"
    return "None" if arg is None else "fp32"


def target_of(arch: str) -> GPUTarget:
    """A chip as Triton's compilers take it."""
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def compile_for(launch: Launch, arch: str) -> CompiledKernel:
    """The machine code of a launch; needs neither GPU nor driver."""
    kernel = getattr(import_module(launch.module), launch.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}
    target = target_of(arch)
    early = host.starts_early(target)
    named = dict(launch.constants) | launch.tile.blocks() | {"PDL": early}
    for i, name in enumerate(kernel.arg_names):
        kind = launch.arguments[i] if i < len(launch.arguments) else "constant"
        if kind in ("constant", "None", "1"):
            signature[name] = "constexpr"
            constants[(i,)] = named[name] if kind == "constant" else {"None": None, "1": 1}[kind]
            continue
        signature[name] = kind.split()[0]
        if kind.startswith("*") or kind.endswith(" 16"):  # PyTorch's allocations are aligned
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages} | ({"launch_pdl": True} if early else {})
    return triton.compile(source, target=target, options=options)


def line_of(launch: Launch, arch: str) -> dict[str, object]:
    """One line: what can be read from the machine code of a launch."""
    try:
        figures = figures_of(compile_for(launch, arch), arch)
    except Exception as error:  # each of Triton's compilers raises errors of its own
        what = f"{launch.kernel} for {arch} under Triton {triton.__version__}, {launch.tile}"
        raise MachineCodeError(f"{what}: {type(error).__name__}: {error}") from error
    line: dict[str, object] = {
        "triton": triton.__version__,
        "kernel": launch.kernel,
        "config": {name: value for name, value in launch.constants if isinstance(value, int | str)}
        | {"types": " ".join(launch.arguments)}
        | launch.tile.blocks()
        | {"warps": launch.tile.warps, "stages": launch.tile.stages},
        "arch": arch,
    }
    return line | figures


def complaints(line: dict) -> list[str]:
    """What is wrong with a launch."""
    wants_tensor_cores = has_half_dots(line)
    rules = {
        "spills": line["loop_spills"] > FEW_IN_LOOP or line["spills"] > FEW_SPILLS,
        "stack": line["stack"] > 2 * FEW_SPILLS,
        "too much shared memory": line["shared"] > CHIPS[line["arch"]].shared_memory,
        "no tensor cores": wants_tensor_cores and line["mma"] == 0,
        "no wgmma": wants_tensor_cores and line["arch"] == "sm_90" and line["wgmma"] == 0,
        "serialised wgmma": line["serialised"],
        "does not fit a processor": line["programs"] == 0,
        "reads a register that nothing wrote": line["undefined"] > 0,
        "touches memory before it waits": host.starts_early(target_of(line["arch"])) and line["before_wait"] > 0,
    }
    return [complaint for complaint, broken in rules.items() if broken]


def has_half_dots(line: dict) -> bool:
    """Whether a kernel multiplies bf16 or fp16."""
    has_dots = any(stage in line["kernel"] for stage in ("_one_pass_", "_shrink_", "_expand_", "_wgrad_"))
    return has_dots and any(half in line["config"]["types"] for half in ("*bf16", "*fp16"))


def lines_of(cases: list[Case | Stack], archs: list[str], processes: int) -> Iterator[dict]:
    """A line for each distinct launch of the cases on each chip."""
    jobs = dict.fromkeys((launch, arch) for arch, one in product(archs, cases) for launch in launches(one, CHIPS[arch]))
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(line_of, *zip(*jobs, strict=True))


COLUMNS = {  # of the table: the width, and the key in a line
    "registers": (10, "regs"),
    "loop": (10, "loop"),
    "its mma": (8, "loop_mma"),
    "its loads": (10, "loop_loads"),
    "mma": (8, "mma"),
    "wgmma": (6, "wgmma"),
    "cp.async": (9, "cp_async"),
    "shared KB": (10, "shared"),
    "programs": (9, "programs"),
}
LEGEND = """\
serialised  configurations whose wgmma wait for one another
registers   of a thread
loop        instructions of a step of the main loop; "its mma" are those for tensor cores, "its loads" load global memory
            into registers, not by cp.async; mma, wgmma and cp.async count in the whole kernel
programs    that fit one processor at once, by registers, warps and shared memory"""


def table(found: list[dict]) -> str:
    """The ranges over the configurations of each kernel on each chip; loops and tensor cores of bf16 and fp16 alone."""
    of_kernel: dict[tuple[str, str], list[dict]] = {}
    for line in found:
        of_kernel.setdefault((line["kernel"], line["arch"]), []).append(line)
    names = "".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())
    lines = [f"{'kernel':<27} {'arch':<6} configs spills stack serialised{names}"]
    for (kernel, arch), of_one in sorted(of_kernel.items()):
        half = [line for line in of_one if has_half_dots(line)]
        spills, stack = (max(line[key] for line in of_one) for key in ("spills", "stack"))
        ranges = ""
        for width, key in COLUMNS.values():
            of_all = key in ("regs", "shared", "programs")
            numbers = [line[key] >> 10 if key == "shared" else line[key] for line in (of_one if of_all else half)]
            ranges += f"{_range(numbers):>{width}}"
        serialised = sum(line["serialised"] for line in of_one)
        lines.append(f"{kernel:<27} {arch:<6} {len(of_one):>7} {spills:>6} {stack:>5} {serialised:>10}{ranges}".rstrip())
    return "\n".join(lines)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers, default=""), max(numbers, default="")
    return f"{low}" if low == high else f"{low}-{high}"


def main() -> int:
    """Print a line for each launch and a table of the kernels; 1 where there are complaints, 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspect.static",
        description="Compile the Triton kernels for GPUs that this machine does not have.",
    )
    parser.add_argument("--quick", action="store_true", help="five cases, not all")
    parser.add_argument("--one", action="store_true", help="one case, not all")
    parser.add_argument("--arch", nargs="*", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="as many as there are cores, if not given"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the lines and the table")
    args = parser.parse_args()
    cases = QUICK[:1] if args.one else QUICK if args.quick else CASES
    found, wrong = [], 0
    try:
        for line in lines_of(cases, args.arch, args.processes):
            print(json.dumps(line), flush=True)
            found.append(line)
            if complaint := complaints(line):
                wrong += 1
                print(f"{line['kernel']} on {line['arch']}: {', '.join(complaint)}", file=sys.stderr)
    except MachineCodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = f"{len(found)} configurations, {wrong} with complaints"
    summary = f"compiled {provenance()}; {counts}\n\n{LEGEND}\n\n{table(found)}"
    print(f"\n{summary}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = f"triton-{triton.__version__}"
        (args.out / f"{stem}.txt").write_text(summary + "\n")
        (args.out / f"{stem}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
