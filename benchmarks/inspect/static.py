"""Compile the Triton kernels for GPUs that need not be here, and read registers and spills from the machine code.

    python -m benchmarks.static [--quick | --one] [--arch sm_90 ...] [--out benchmarks/results/static]

One JSON line for each kernel and configuration that `configs.py` chooses over `SITUATIONS`, then a table of the kernels;
`--out` keeps them as kernels.jsonl and kernels.txt. The launches are those of the backend itself: it is called on tensors
without memory, with its launcher replaced by a recorder. Exits with 1 where something spills, has a stack, wants more shared
memory than the chip has, or uses no tensor cores where it could.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.environment import provenance
from lmoe_kernels.backends.triton.configs import Chip, Tile

CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 108, 163 << 10),
        Chip("sm_90", 132, 227 << 10),
        Chip("sm_100", 148, 227 << 10),
        Chip("gfx942", 304, 64 << 10),
    )
}
TYPES = {torch.int32: "i32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SPILLED, TENSOR_CORES = r"\b(?:STL|LDL)\b", r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"


@dataclass(frozen=True)
class Situation:
    """A call whose launches are compiled."""

    T: int = 65536
    I: int = 4096  # noqa: E741
    O: int = 4096  # noqa: E741
    E: int = 8
    R: int = 16
    shared_a: bool = False
    mixing: str = "factors"
    top_k: int | None = None
    renormalize: bool = True
    outside: bool = False
    dtype: torch.dtype = torch.bfloat16
    parameters: torch.dtype = torch.bfloat16


QUICK = [Situation(), Situation(T=16), Situation(T=8192, E=64, top_k=2)]
SITUATIONS = [
    *QUICK,
    *(
        Situation(T=t, E=e, R=r)
        for t in (16, 4096, 65536)
        for e, r in ((1, 16), (4, 8), (8, 32), (16, 16), (128, 8), (256, 4))
    ),
    Situation(T=8192, E=128, top_k=2, mixing="outputs"),
    *(Situation(T=t, E=e, top_k=2, renormalize=False) for t in (16, 65536) for e in (8, 64)),
    *(Situation(T=t, top_k=2, renormalize=False, shared_a=True) for t in (16, 65536)),
    *(Situation(T=t, I=2051, O=1025, E=5, R=3) for t in (16, 65536)),
    *(Situation(E=4, R=64, mixing=mixing) for mixing in ("factors", "outputs")),
    *(Situation(mixing="outputs", outside=outside, top_k=k) for outside, k in ((False, None), (True, 2))),
    *(Situation(T=t, shared_a=True, parameters=torch.float32) for t in (16, 65536)),
    *(Situation(T=t, dtype=torch.float16, parameters=torch.float16) for t in (16, 65536)),
    *(Situation(T=t, E=e, dtype=torch.float32, parameters=torch.float32) for t in (16, 65536) for e in (8, 64)),
]


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be started: what Triton specialises its machine code on."""

    module: str
    kernel: str
    arguments: tuple[str, ...]  # "*bf16", "i32", "i32 16" where divisible by 16, "1", "fp32", "None"
    constants: tuple[tuple[str, object], ...]
    tile: Tile


def launches(situation: Situation, chip: Chip) -> list[Launch]:
    """What a forward and a backward would start on a chip, each once."""
    s, found = situation, []

    def make(*shape: int, dtype: torch.dtype = s.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def record(kernel: triton.JITFunction, grid: tuple[int, ...], *args: object, tile: Tile, **constants: object) -> None:
        kinds = tuple(_kind(arg, p.do_not_specialize) for arg, p in zip(args, kernel.params, strict=False))
        found.append(Launch(kernel.fn.__module__, kernel.fn.__name__, kinds, tuple(constants.items()), tile))

    modules = {name: import_module(f"lmoe_kernels.backends.triton.{name}") for name in ("forward", "backward", "grouped")}
    a = make(1 if s.shared_a else s.E, s.R, s.I, dtype=s.parameters)
    b, gate, outside = make(s.E, s.R, s.O, dtype=s.parameters), None, None
    if s.outside:
        outside = make(s.T, s.E)
    else:
        gate = make(s.E, s.I, dtype=s.parameters)
    x, dy, options = make(s.T, s.I), make(s.T, s.O), (0.5, s.mixing, s.top_k, s.renormalize)
    forward, backward = modules["forward"], modules["backward"]
    with ExitStack() as patches:
        for module in modules.values():
            patches.enter_context(mock.patch.object(module, "launch", record))
        for module in (forward, backward):
            patches.enter_context(mock.patch.object(module, "chip_of", return_value=chip))
        _, logits, u = forward.forward(x, a, b, gate, outside, None, *options, True)
        assert u is not None
        logits = make(s.T, s.E) if logits is None else logits
        backward.backward(dy, make(*logits.shape, dtype=logits.dtype), x, a, b, gate, logits, u, *options, (True,) * 4)
    return list(dict.fromkeys(found))


def _kind(arg: object, do_not_specialize: bool) -> str:
    if isinstance(arg, Tensor):
        return "*" + TYPES[arg.dtype]
    if isinstance(arg, int):
        return "i32" if do_not_specialize else "1" if arg == 1 else "i32 16" if arg % 16 == 0 else "i32"
    return "None" if arg is None else "fp32"


def compile_for(launch: Launch, arch: str) -> CompiledKernel:
    """The machine code of a launch; needs neither GPU nor driver."""
    kernel = getattr(import_module(launch.module), launch.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}
    named = dict(launch.constants) | launch.tile.blocks()
    for i, name in enumerate(kernel.arg_names):
        kind = launch.arguments[i] if i < len(launch.arguments) else "constant"
        if kind in ("constant", "None", "1"):
            signature[name] = "constexpr"
            constants[(i,)] = named[name] if kind == "constant" else {"None": None, "1": 1}[kind]
            continue
        signature[name] = kind.split()[0]
        if kind.startswith("*") or kind.endswith(" 16"):  # PyTorch's allocations are aligned
            attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.tile.warps, "num_stages": launch.tile.stages})


def inspect(launch: Launch, arch: str) -> dict[str, object]:
    """One row: what the machine code of a launch says of itself."""
    compiled = compile_for(launch, arch)
    row: dict[str, object] = {
        "kernel": launch.kernel,
        "config": {name: value for name, value in launch.constants if isinstance(value, int)}
        | {"types": " ".join(launch.arguments)}
        | launch.tile.blocks()
        | {"warps": launch.tile.warps, "stages": launch.tile.stages},
        "arch": arch,
    }
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    return row | read(compiled) | {"shared": compiled.metadata.shared}


def _read_nvidia(compiled: CompiledKernel) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    counts = {
        "spills": SPILLED,
        "mma": TENSOR_CORES,
        "wgmma": r"\bHGMMA\b",
        "cp_async": r"\bLDGSTS\b",
        "tma": r"\bUTMALDG\b",
    }
    return {"regs": int(used["REG"]), "stack": int(used["STACK"])} | {n: len(re.findall(p, code)) for n, p in counts.items()}


def _read_amd(compiled: CompiledKernel) -> dict[str, int]:
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return max(map(int, re.findall(rf"\.{key}:\s*(\d+)", code)), default=0)

    return {
        "regs": number("vgpr_count"), "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "mma": len(re.findall(r"\bv_mfma_", code)), "wgmma": 0, "cp_async": 0, "tma": 0,
    }  # fmt: skip


def complaints(row: dict) -> list[str]:
    """What is wrong with a row."""
    wants_tensor_cores = has_half_dots(row)
    rules = {
        "spills": row["spills"] > 0,
        "stack": row["stack"] > 0,
        "too much shared memory": row["shared"] > CHIPS[row["arch"]].shared_memory,
        "no tensor cores": wants_tensor_cores and row["mma"] == 0,
        "no wgmma": wants_tensor_cores and row["arch"] == "sm_90" and row["wgmma"] == 0,
    }
    return [complaint for complaint, broken in rules.items() if broken]


def has_half_dots(row: dict) -> bool:
    """Whether a row's kernel multiplies bf16 or fp16."""
    has_dots = any(stage in row["kernel"] for stage in ("_one_pass_", "_shrink_", "_expand_", "_wgrad_"))
    return has_dots and any(half in row["config"]["types"] for half in ("*bf16", "*fp16"))


def rows(situations: list[Situation], archs: list[str], processes: int) -> Iterator[dict]:
    """A row for each distinct launch of the situations on each chip."""
    jobs = dict.fromkeys((launch, arch) for arch, s in product(archs, situations) for launch in launches(s, CHIPS[arch]))
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(inspect, *zip(*jobs, strict=True))


def table(found: list[dict]) -> str:
    """The ranges over the configurations of each kernel on each chip; tensor cores' instructions of bf16 and fp16 alone."""
    of_kernel: dict[tuple[str, str], list[dict]] = {}
    for row in found:
        of_kernel.setdefault((row["kernel"], row["arch"]), []).append(row)
    lines = [f"{'kernel':<27} {'arch':<7} configs  registers  spills  stack   shared KB        mma    wgmma"]
    for (kernel, arch), of_one in sorted(of_kernel.items()):
        half = [row for row in of_one if has_half_dots(row)]
        regs, shared = _range([r["regs"] for r in of_one]), _range([r["shared"] >> 10 for r in of_one])
        mma, wgmma = (_range([r[key] for r in half]) for key in ("mma", "wgmma"))
        spills, stack = (max(r[key] for r in of_one) for key in ("spills", "stack"))
        lines.append(
            f"{kernel:<27} {arch:<7} {len(of_one):>7} {regs:>10} {spills:>7} {stack:>6} {shared:>11} {mma:>10} {wgmma:>8}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _range(numbers: list[int]) -> str:
    return f"{min(numbers)}-{max(numbers)}" if numbers else ""


def main() -> int:
    """Print a line for each launch and a table of the kernels; 1 where there are complaints."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that need not be here.")
    parser.add_argument("--quick", action="store_true", help="three situations, not all")
    parser.add_argument("--one", action="store_true", help="one situation, not all")
    parser.add_argument("--arch", nargs="*", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to keep the lines and the table")
    args = parser.parse_args()
    situations = QUICK[:1] if args.one else QUICK if args.quick else SITUATIONS
    found, wrong, says = [], 0, f"compiled {provenance()}"
    for row in rows(situations, args.arch, args.processes):
        print(json.dumps(row), flush=True)
        found.append(row)
        if complaint := complaints(row):
            wrong += 1
            print(f"{row['kernel']} on {row['arch']}: {', '.join(complaint)}", file=sys.stderr)
    says += f"; {len(found)} configurations, {wrong} with complaints\n\n{table(found)}"
    print(f"\n{says}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "kernels.txt").write_text(says + "\n")
        (args.out / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
