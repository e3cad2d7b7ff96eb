"""The kernels of an architecture as the compiler made them: registers, blocks that fit a processor, and a step."""

from typing import Any, NamedTuple

from benchmarks.model import mix
from benchmarks.model.chips import CHIPS, resident_blocks
from benchmarks.model.cubins import Built, constant
from benchmarks.model.kernels import EXPAND, HELD_STEPS, Machine, device_of, plus, shrink_tile, walk_shared, wgrad_tile
from benchmarks.model.loops import Step
from lmoe_kernels.backends.cuda import configs

MANY_TOKENS, PROCESSORS = 1 << 20, 132  # of a forward in one pass, and of a decode
EXPERTS = {64: 3, 128: 7, 144: 8}  # of rank 16, whose factors and gate take so many columns of a product
OF_FEW_TOKENS = ("decode_fwd", "stacked")


class Line(NamedTuple):
    """A kernel, with one of the loops that it has."""

    kernel: str
    loop: str
    registers: int
    resident: int
    step: Step | None

    def record(self) -> dict[str, Any]:
        """For the file of JSON."""
        return self._asdict() | {"step": self.step and self.step._asdict()}


def lines(machine: Machine) -> list[Line]:
    """All kernels of bf16, in alphabetical order."""
    found = []
    for kernel, built in sorted(machine.builds.items()):
        name, sizes = kernel.name, kernel.sizes
        for loop, step in _steps(machine, name, sizes).items():
            found.append(Line(f"{name}{list(sizes) or ''}", loop, built.registers, resident(built), step))
    return found


def resident(built: Built, count: int = 8 * 17) -> int:
    """The blocks of a kernel that fit a processor at once, by its registers, threads and shared memory.

    In expand_walk the latter also holds `count` coefficients of each token, or as many as it takes.
    """
    name, dtype, sizes = built.kernel
    shared = built.shared + shared_of(name, sizes, 4 if dtype == "fp32" else 2, count)
    return resident_blocks(built.registers, threads_of(name), shared, built.arch)


def threads_of(name: str) -> int:
    """The threads of a block."""
    if name.startswith("mix_"):
        return 32 * constant("MIX_WARPS")
    return 32 * configs.DECODE_WARPS if name in OF_FEW_TOKENS else constant("THREADS")


def shared_of(name: str, sizes: tuple[int, ...], size: int, count: int) -> int:
    """Bytes of shared memory that a launch asks for; of the forward with EXPERTS, and of the others with 8 of rank 16."""
    if name == "forward":
        experts, rank = EXPERTS[sizes[0]], 16
        return configs.one_pass_smem(MANY_TOKENS, experts, rank, experts * (rank + 1), size, PROCESSORS)
    if name in OF_FEW_TOKENS:
        plan = configs.decode_plan(16, 4096, 4096, 8, 8, 16, True, size, device_of(CHIPS["H100"]))
        return plan.smem if plan is not None else 0
    if name.startswith("mix_"):
        return mix.Launch.of(128, 8, 16, name == "mix_bwd", size).shared if sizes[1] else 0
    if name == "expand_walk":
        return walk_shared(min(count, HELD_STEPS * configs.STEP_BYTES // size), size)
    tiles = {"shrink": shrink_tile, "wgrad_bwd": wgrad_tile}
    return tiles[name](*sizes).shared(size) if name in tiles else EXPAND.shared(size) if name == "expand" else 0


def _steps(machine: Machine, name: str, sizes: tuple[int, ...]) -> dict[str, Step | None]:
    match name:
        case "shrink":
            return {"shrink": machine.step(name, sizes, shrink_tile(*sizes))}
        case "wgrad_bwd":
            return {"wgrad": machine.step(name, sizes, wgrad_tile(*sizes))}
        case "expand":
            step = machine.step(name, sizes, EXPAND)
            return {"y": step, "dx": plus(step, machine.addresses(name, sizes, EXPAND))}
        case "expand_walk":
            step = machine.sweep(name, sizes)
            return {"y": step, "dx": plus(step, machine.sweep_addresses(name, sizes))}
        case "forward":
            return {"shrink": machine.step(name, sizes, shrink_tile(*sizes)), "sweep": machine.sweep(name, sizes)}
    return {"": None}


def table(of_archs: dict[str, list[Line]]) -> str:
    """The lines of all architectures next to one another."""
    titles = "".join(f"{arch:>30}" for arch in of_archs)
    units = "".join(f"{'regs at once instr HMMA alone':>30}" for _ in of_archs)
    text = [f"{'kernel, its loop':<24}{titles}", f"{'':<24}{units}"]
    for row in zip(*of_archs.values(), strict=True):
        cells = ""
        for line in row:
            step = line.step
            figures = f"{step.instructions:6.0f}{step.products:5.0f}{step.alone:6.0f}" if step is not None else ""
            cells += f"{line.registers:5}{line.resident:8}{figures:17}"
        text.append(f"{f'{row[0].kernel} {row[0].loop}':<24}{cells}".rstrip())
    return "\n".join(text)
