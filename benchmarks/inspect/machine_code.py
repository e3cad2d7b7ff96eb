"""Read machine code: registers, spills, the main loop, what the compiler serialised or got wrong, and what fits a processor.

`figures_of` reads a compiled kernel with the tools that come with Triton. `read_sass` and `read_amdgcn` read text alone.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

SPILL = r"(STL|LDL)\b"
TENSOR_CORES = r"(HMMA|HGMMA|UTC\w*MMA)\b"
OF_PTX = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
WAIT = r"ACQBULK\b"  # for the previous kernel: griddepcontrol.wait
# Accesses to global memory, and griddepcontrol.launch_dependents
AFTER_THE_WAIT = r"(LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|REDG|CCTL|UBLK\w+|UTMA\w+|PREEXIT)\b"
FMA = r"(FFMA|HFMA2|DFMA|v_(pk_)?fmac?_)"
# Instructions that write the uniform register which they name first, or behind a predicate, and how many with those after it
WRITES = r"(?!U[IF]?SETP)(?:U\w+|R2UR|S2UR|LDCU|VOTEU|C?REDUX|CS2UR|ELECT)(?:\.\w+)* +(?:U?P[\dT], +)?UR(\d+)\b(?!\])"
WIDTHS = {r"\S+\.(64|WIDE)\b": 2, r"\S+\.128\b": 4}


class MachineCodeError(RuntimeError):
    """Machine code that cannot be read: a tool failed, or its output has an unknown form."""


class Instruction(NamedTuple):
    """What a search for loops, and one for registers, needs of one instruction."""

    text: str  # from the opcode on
    target: str | None  # the label that it may jump to
    continues: bool  # whether the next instruction may follow it
    guarded: bool = False  # whether a predicate decides if it runs


class Code(NamedTuple):
    """The instructions of a kernel, and the index of the one at each label."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, pattern: str) -> int:
        """The instructions that begin with a pattern."""
        return sum(re.match(pattern, one.text) is not None for one in self.instructions)


def figures_of(compiled: CompiledKernel, arch: str) -> dict[str, int | bool]:
    """What is known of a compiled kernel; raises MachineCodeError where that cannot be read."""
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if arch.startswith("gfx"):
        found = read_amdgcn(compiled.asm["amdgcn"])
        tensor_memory = 0
    else:
        usage, code = _disassembled(compiled.asm["cubin"])
        found = read_sass(code, usage, compiled.asm["ptx"])
        tensor_memory = compiled.metadata.tmem_size or 0
    programs = programs_of_a_processor(arch, int(found["regs"]), warps, shared, tensor_memory)
    return found | {"shared": shared, "programs": programs}


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the instructions of a cubin, as Triton's copies of NVIDIA's tools print them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output(tools / "cuobjdump", "--dump-resource-usage", file.name), _output(tools / "nvdisasm", "-c", file.name)


def _output(*command: object) -> str:
    words = list(map(str, command))
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise MachineCodeError(f"{words[0]} failed with exit code {error.returncode}: {error.stderr.strip()}") from error
    except OSError as error:
        raise MachineCodeError(f"{words[0]} cannot be started: {error}") from error


def read_sass(code: str, usage: str, ptx: str) -> dict[str, int | bool]:
    """Figures of a kernel for an NVIDIA GPU: of `nvdisasm -c`, `cuobjdump --dump-resource-usage`, and its PTX."""
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    if used.keys() != {"REG", "STACK"}:
        raise MachineCodeError(f"cuobjdump names no registers or no stack: {usage[:300]!r}")
    read = parse_sass(code)
    mma = read.count(TENSOR_CORES)
    if bool(mma) != bool(re.search(OF_PTX, ptx)):
        raise MachineCodeError(f"the PTX has tensor-core instructions, the SASS has {mma} that are known, or the reverse")
    found = {
        "regs": int(used["REG"]), "stack": int(used["STACK"]), "spills": read.count(SPILL), "mma": mma,
        "wgmma": read.count(r"HGMMA\b"), "serialised": is_serialised(read, ptx), "cp_async": read.count(r"LDGSTS\b"),
        "tma": read.count(r"UTMALDG\b"), "before_wait": before_the_wait(read), "undefined": undefined_registers(read),
    }  # fmt: skip
    return found | _of_main_loop(read, TENSOR_CORES, r"LDG\b", SPILL)


def before_the_wait(code: Code) -> int:
    """How many accesses to global memory can run before the kernel has waited for the previous one; all if it never waits.

    Letting the next kernel start counts too.
    """
    after, _ = _edges(code)
    for i, one in enumerate(code.instructions):
        if re.match(WAIT, one.text):
            after[i].clear()
    early = Code([code.instructions[i] for i in _reachable(after, 0)], {})
    return early.count(AFTER_THE_WAIT)


def undefined_registers(code: Code) -> int:
    """How many uniform registers may be read before an instruction has written them, of which a correct kernel has none.

    These are the registers that are live at the kernel's entry. An instruction with a predicate may not run, so that what it
    writes counts as not written. ptxas 12.8 made such code for sm_90 of a weight gradient: the products read descriptors of
    shared memory that nothing had computed, and an H200 gave a wrong gradient (2026-11-26).
    """
    after, before = _edges(code)
    reads, writes = zip(*map(_uniform_registers, code.instructions), strict=True)
    live = [0] * len(code.instructions)  # before each instruction; a register is a bit
    waiting = list(range(len(live)))
    while waiting:
        i = waiting.pop()
        behind = 0
        for j in after[i]:
            behind |= live[j]
        now = reads[i] | behind & ~writes[i]
        if now != live[i]:
            live[i] = now
            waiting += before[i]
    return live[0].bit_count()


def _uniform_registers(one: Instruction) -> tuple[int, int]:
    """The uniform registers that an instruction reads, and those that it is sure to write, each as a bit.

    A descriptor takes two registers; that of a wgmma's two operands in shared memory takes four.
    """
    reads = writes = 0
    operands = one.text
    if (written := re.match(WRITES, one.text)) is not None:
        operands = one.text[written.end() :]
        if not one.guarded:
            width = next((width for kind, width in WIDTHS.items() if re.match(kind, one.text)), 1)
            writes = (1 << width) - 1 << int(written[1])
    of_descriptor = 4 if re.match(r"HGMMA\S* R\d+, gdesc", one.text) else 2
    for descriptor, number in re.findall(r"(\bg?desc\[)?\bUR(\d+)\b", operands):
        reads |= (1 << (of_descriptor if descriptor else 1)) - 1 << int(number)
    return reads, writes


def is_serialised(code: Code, ptx: str) -> bool:
    """Whether ptxas made each wgmma wait for the one before, as its warning C7515 says.

    Then every HGMMA ends a group (gsb0), though groups of the PTX have several. Where each of those has one, as in a dot of
    16 columns, every HGMMA ends a group too, with no harm. On 2026-11-25 the warning and this test agreed on 145 kernels for
    sm_90 under Triton 3.6.0, of which 11 were serialised, and on the same under 3.7.1, of which none was.
    """
    instructions, groups = (len(re.findall(rf"\bwgmma\.{one}\b", ptx)) for one in ("mma_async", "commit_group"))
    return instructions > groups and code.count(r"HGMMA\b.*\bgsb0\b") == code.count(r"HGMMA\b")


def read_amdgcn(text: str) -> dict[str, int | bool]:
    """Figures of a kernel for an AMD GPU, of the assembly with its metadata."""
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    try:
        found = {
            "regs": numbers["vgpr_count"], "stack": numbers["private_segment_fixed_size"],
            "spills": numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
        }  # fmt: skip
    except KeyError as error:
        raise MachineCodeError(f"the metadata of the assembly has no {error}") from error
    read = parse_amdgcn(text)
    found |= {"mma": read.count("v_mfma_"), "wgmma": 0, "serialised": False}
    found |= {"cp_async": 0, "tma": 0, "before_wait": 0, "undefined": 0}
    return found | _of_main_loop(read, "v_mfma_", "(global|buffer)_load_", "scratch_")


def parse_sass(text: str) -> Code:
    """The instructions of `nvdisasm -c`."""

    def read(line: str) -> Instruction | None:
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][^;]*);", line)
        if found is None:
            return None
        predicate, instruction = found.groups()
        opcode = re.split(r"[.\s]", instruction, maxsplit=1)[0]
        # for sm_80 ptxas leaves some loops with a CALL of a label; functions have names
        target = re.search(r"`\((\.L\w+)\)", instruction) if opcode in ("BRA", "CALL") else None
        # BRA names a predicate in front of the instruction, or as its own operand
        always = predicate is None and (opcode in ("EXIT", "RET") or re.match(r"BRA(\.\w+)* `", instruction) is not None)
        return Instruction(instruction.strip(), target and target[1], not always, predicate is not None)

    return _parsed(text, r"(\.L\w+):", read)


def parse_amdgcn(text: str) -> Code:
    """The instructions of AMD's assembly."""

    def read(line: str) -> Instruction | None:
        found = re.match(r"\s+([a-z]+_\w+)(.*)", line)
        if found is None:
            return None
        opcode, operands = found.groups()
        target = re.search(r"\.LBB\w+", operands) if re.match(r"s_c?branch", opcode) else None
        return Instruction(opcode + operands, target and target[0], opcode not in ("s_branch", "s_endpgm"))

    return _parsed(text, r"(\.LBB\w+):", read)


def _parsed(text: str, label: str, read: Callable[[str], Instruction | None]) -> Code:
    code = Code([], {})
    for line in text.splitlines():
        if (named := re.match(label, line)) is not None:
            code.labels[named[1]] = len(code.instructions)
        elif (instruction := read(line)) is not None:
            code.instructions.append(instruction)
    if not code.instructions:
        raise MachineCodeError(f"no instruction in {text[:300]!r}")
    unknown = {one.target for one in code.instructions if one.target is not None} - code.labels.keys()
    if unknown:
        raise MachineCodeError(f"jumps to labels that are not there: {sorted(unknown)}")
    return code


def _of_main_loop(code: Code, mma: str, load: str, spill: str) -> dict[str, int | bool]:
    """The instructions of a step of the main loop; of them products, loads of global memory into registers, and spills.

    That is the innermost loop with the most tensor-core instructions or, without any, with the most fused multiply-adds. All
    are zero for a kernel that multiplies outside of loops. ptxas unrolls none of these loops: on 2026-11-25 the SASS of 108
    kernels had as many tensor-core instructions as their PTX, under Triton 3.6.0 and 3.7.1.
    """
    all_loops = loops(code)
    for products in (mma, FMA):
        counts = [_within(code, loop).count(products) for loop in all_loops]
        multiplying = [(count, loop) for count, loop in zip(counts, all_loops, strict=True) if count > 0]
        innermost = [(count, loop) for count, loop in multiplying if not any(other < loop for _, other in multiplying)]
        if innermost:
            main = _within(code, max(innermost, key=lambda found: found[0])[1])
            names = {"loop_mma": mma, "loop_loads": load, "loop_spills": spill}
            return {"loop": len(main.instructions)} | {name: main.count(one) for name, one in names.items()}
    return {"loop": 0, "loop_mma": 0, "loop_loads": 0, "loop_spills": 0}


def _within(code: Code, loop: frozenset[int]) -> Code:
    return Code([code.instructions[i] for i in sorted(loop)], {})


def loops(code: Code) -> list[frozenset[int]]:
    """The indices of each loop's instructions: of those that can run between its first one and the return to it.

    A loop cannot be entered but at its first instruction. A jump back alone does not make one, because compilers also place
    rarely taken paths behind the kernel's end.
    """
    after, before = _edges(code)
    found = []
    reached = _reachable(after, 0)
    for first in sorted(_returned_to(after, 0)):
        around = _reachable(after, 0, without=first)
        body = {first}
        for last in before[first]:
            if last in reached - around:
                body |= _reachable(before, last, without=first)
        if len(body) > 1:
            found.append(frozenset(body))
    return found


def _returned_to(edges: list[list[int]], start: int) -> set[int]:
    """What an edge leads back to on a walk into the depth: every loop begins with one of these."""
    found: set[int] = set()
    seen, path, stack = {start}, {start}, [(start, iter(edges[start]))]
    while stack:
        i, rest = stack[-1]
        j = next(rest, None)
        if j is None:
            path.remove(i)
            stack.pop()
        elif j in path:
            found.add(j)
        elif j not in seen:
            seen.add(j)
            path.add(j)
            stack.append((j, iter(edges[j])))
    return found


def _edges(code: Code) -> tuple[list[list[int]], list[list[int]]]:
    """For each instruction those that may follow it, and those that it may follow."""
    size = len(code.instructions)
    after: list[list[int]] = [[] for _ in range(size)]
    before: list[list[int]] = [[] for _ in range(size)]
    for i, one in enumerate(code.instructions):
        targets = [code.labels[one.target]] if one.target is not None else []
        for j in targets + [i + 1] * one.continues:
            if j < size:
                after[i].append(j)
                before[j].append(i)
    return after, before


def _reachable(edges: list[list[int]], start: int, without: int | None = None) -> set[int]:
    """What can be reached from an instruction along edges that avoid another one."""
    found: set[int] = set()
    waiting = [start]
    while waiting:
        i = waiting.pop()
        if i != without and i not in found:
            found.add(i)
            waiting += edges[i]
    return found


def programs_of_a_processor(arch: str, regs: int, warps: int, shared: int, tensor_memory: int) -> int:
    """The programs that fit one processor at once, by registers, warps, shared memory and tensor memory.

    Source: the tables of compute capabilities in NVIDIA's CUDA C++ Programming Guide, and AMD's CDNA 3 ISA Reference Guide.
    """
    if arch.startswith("gfx"):
        waves = min(8, 512 // (-(-regs // 8) * 8))  # on each of four units
        return min(4 * waves // warps, (64 << 10) // max(shared, 1))
    most_warps = 48 if arch in ("sm_86", "sm_89", "sm_120") else 64
    memory = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_120": 100}.get(arch, 228) << 10
    warps_by_registers = 4 * (
        16384 // (-(-regs // 8) * 8 * 32)
    )  # each of four units has 16384, and gives warps multiples of 8
    fitting = [most_warps // warps, warps_by_registers // warps, memory // (shared + 1024)]  # 1 KB is the system's
    return min([*fitting, 512 // tensor_memory] if tensor_memory else fitting)
