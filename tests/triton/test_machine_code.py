"""The reader of machine code, on short texts in the form of each tool's output."""

import re
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from benchmarks.inspect import machine_code, static
from benchmarks.inspect.machine_code import MachineCodeError, loops, parse_amdgcn, parse_sass, programs_of_a_processor
from lmoe_kernels.backends.triton.plans import Tile

USAGE = "Function kernel:\n  REG:90 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0"
WGMMA = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
OF_ONE_GROUP = f"{WGMMA} {{%f1}}; {WGMMA} {{%f1}}; wgmma.commit_group.sync.aligned;"
OF_TWO_GROUPS = f"{WGMMA} {{%f1}}; wgmma.commit_group.sync.aligned; {WGMMA} {{%f2}}; wgmma.commit_group.sync.aligned;"
ENDS_A_GROUP = """
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspA.tnspB, R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
"""
IN_A_GROUP = "\n    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspA.tnspB, R24\n"


def sass(text: str) -> str:
    """Lines as nvdisasm prints them, each instruction behind its address."""
    lines = [line.strip() for line in text.strip().splitlines()]
    addressed = (line if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))
    return "\n".join(["\t.section\t.text.kernel", "kernel:", *addressed])


def pipeline(products: str) -> str:
    """A loop over steps behind a load of its own, in which the products wait for one of three cp.async."""
    return sass(f"""
        LDC R1, c[0x0][0x28]
        LDG.E.128 R4, desc[UR4][R2.64]
        LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64], P0
        @P2 BRA `(.L_x_0)
        .L_x_1:
        BAR.SYNC.DEFER_BLOCKING 0x0
        {products}
        LDGSTS.E.BYPASS.128 [R8+0x800], desc[UR4][R2.64], P0
        @!P1 LDG.E R5, desc[UR4][R2.64]
        @!P2 BRA `(.L_x_1)
        .L_x_0:
        EXIT
        .L_x_2:
        BRA `(.L_x_2)
    """)


@pytest.mark.parametrize(
    "products, ptx, serialised",
    [
        (2 * ENDS_A_GROUP, OF_ONE_GROUP, True),
        (IN_A_GROUP + ENDS_A_GROUP, OF_ONE_GROUP, False),
        (2 * ENDS_A_GROUP, OF_TWO_GROUPS, False),
    ],
    ids=["each waits for the one before", "one group", "the kernel itself makes two groups"],
)
def test_serialised_wgmma(products: str, ptx: str, serialised: bool) -> None:
    found = machine_code.read_sass(pipeline(products), USAGE, ptx)
    assert found["serialised"] is serialised
    assert (found["regs"], found["stack"], found["spills"]) == (90, 0, 0)
    assert (found["mma"], found["wgmma"], found["cp_async"]) == (2, 2, 2)
    assert (found["loop"], found["loop_mma"], found["loop_loads"]) == (6 + products.count("DEPBAR"), 2, 1)


def test_spills_are_counted() -> None:
    spilling = sass("STL [R1], R4\nSTL.64 [R1+0x8], R6\nLDL.LU R4, [R1]\nEXIT")
    found = machine_code.read_sass(spilling, USAGE.replace("STACK:0", "STACK:16"), "")
    assert (found["spills"], found["stack"], found["loop"]) == (3, 16, 0)


def test_spills_in_the_loop_are_counted_apart() -> None:
    code = parse_sass(sass("STL [R1], R4\n.L_a:\nLDL R4, [R1]\nFFMA R1, R2, R4, R1\n@P0 BRA `(.L_a)\nEXIT"))
    found = machine_code._of_main_loop(code, machine_code.TENSOR_CORES, r"LDG\b", machine_code.SPILL)
    assert (found["loop"], found["loop_spills"]) == (3, 1)


@pytest.mark.parametrize(
    "start, before_wait",
    [
        ("S2R R0, SR_CTAID.X\nACQBULK", 0),
        ("ATOMS.OR RZ, [UR5], R3\n@P0 BRA `(.L_x_5)\n.L_x_5:\nLDS R3, [R2]\nACQBULK", 0),
        ("LDG.E R3, desc[UR4][R2.64]\nACQBULK", 1),
        ("@P0 LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64]\nPREEXIT\nACQBULK", 2),
        ("@P0 BRA `(.L_x_5)\nACQBULK\n.L_x_5:\nIMAD R1, R2, R3, R4", 3),
        ("IMAD R1, R2, R3, R4", 3),
    ],
    ids=["a wait", "shared memory is the program's own", "a load", "an asynchronous load", "a way around the wait", "none"],
)
def test_accesses_before_the_wait(start: str, before_wait: int) -> None:
    rest = "LDG.E R4, desc[UR4][R2.64]\nPREEXIT\nSTG.E desc[UR4][R2.64], R4\nEXIT"
    assert machine_code.read_sass(sass(f"{start}\n{rest}"), USAGE, "")["before_wait"] == before_wait


DEFINED = "UMOV UR6, 0x10\nULDC.64 UR4, c[0x0][0x208]"


@pytest.mark.parametrize(
    "text, undefined",
    [
        (f"{DEFINED}\nUIADD3 UR8, UR6, 0x1, URZ\nLDG.E R4, desc[UR4][R2.64]", 0),
        ("UIADD3 UR6, UR6, 0x1, URZ", 1),
        ("UMOV UR4, 0x10\nLDG.E R4, desc[UR4][R2.64]", 1),
        ("@UP0 UMOV UR6, 0x10\nR2UR UR7, R2\nIMAD R1, R2, UR6, R4", 1),
        ("@P0 BRA `(.L_a)\nUMOV UR6, 0x10\n.L_a:\nIMAD R1, R2, UR6, R4", 1),
        ("UMOV UR6, 0x10\n.L_a:\nIMAD R1, R2, UR6, R4\nUIADD3 UR6, UR6, UR7, URZ\n@P0 BRA `(.L_a)", 1),
        (".L_a:\nR2UR UR7, R5\nUMOV UR6, UR7\nUIADD3 UR8, UR6, UR7, URZ\n@P0 BRA `(.L_a)\nIMAD R1, R2, UR8, R4", 0),
        ("BRA `(.L_b)\n.L_a:\nIMAD R1, R2, UR7, R4\nEXIT\n.L_b:\nR2UR UR6, R2\nBRA `(.L_a)", 1),
        (f"{DEFINED}\nEXIT\nUMOV UR9, UR8", 0),
        ("UISETP.GE.AND UP0, UPT, UR4, 0x1, UPT", 1),
        ("CREDUX.MAX.F32 UR6, R12\nIMAD.U32 R22, RZ, RZ, UR6", 0),
        ("UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR5", 1),
        ("LDCU.128 UR4, c[0x0][0x390]\nIMAD R1, UR4, UR7, R1\nIMAD R1, UR5, UR6, R1", 0),
        ("ULDC.64 UR4, c[0x0][0x210]\nUIMAD.WIDE UR6, UR4, UR5, URZ\nHGMMA.64x16x16.F32 R40, gdesc[UR4].tnspA, R40", 0),
        ("ULDC.64 UR4, c[0x0][0x210]\nHGMMA.64x16x16.F32 R40, gdesc[UR4].tnspA.tnspB, R40", 2),
        ("ULDC.64 UR4, c[0x0][0x210]\nHGMMA.64x16x16.F32 R40, R24, gdesc[UR4].tnspB, R40", 0),
        ("ULDC.64 UR4, c[0x0][0x210]\nUTCHMMA gdesc[UR4], gdesc[UR4], tmem[UR4], tmem[UR4], idesc[UR5], !UPT", 0),
        ("STS [UR4+0x10], R2\nUBLKCP [UR8], [UR4], UR6", 3),
    ],
    ids=[
        "all are written", "its own operand", "the upper half of a descriptor", "a predicate decides",
        "a way around the write", "a loop adds what nothing wrote", "a loop writes before it reads", "a jump back",
        "after the end",
        "a comparison writes none", "a maximum over a warp", "behind a predicate", "four at once", "two at once",
        "two operands in shared memory", "one operand in shared memory", "an instruction's own descriptor", "addresses",
    ],
)  # fmt: skip
def test_registers_that_nothing_wrote(text: str, undefined: int) -> None:
    assert machine_code.undefined_registers(parse_sass(sass(f"{text}\nEXIT"))) == undefined


def test_the_main_loop_is_the_innermost_that_multiplies() -> None:
    """An outer loop has a product too; a wait in the inner one spins behind the end, and jumps back into it."""
    code = parse_sass(
        sass("""
        .L_outer:
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        .L_inner:
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR7], R19
        @!P5 BRA `(.L_wait)
        .L_waited:
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        BRA.U !UP0, `(.L_inner)
        BRA.U UP1, `(.L_outer)
        EXIT
        .L_wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR7], R19
        @!P5 BRA `(.L_wait)
        BRA `(.L_waited)
        """)
    )
    assert sorted(map(sorted, loops(code))) == [[0, 1, 2, 3, 4, 5, 6, 8, 9, 10], [1, 2, 3, 4, 5, 8, 9, 10], [8, 9]]
    found = machine_code._of_main_loop(code, machine_code.TENSOR_CORES, r"LDG\b", machine_code.SPILL)
    assert found == {"loop": 8, "loop_mma": 2, "loop_loads": 0, "loop_spills": 0}


def test_a_loop_without_tensor_cores_is_that_of_its_multiply_adds() -> None:
    code = parse_sass(
        sass(".L_a:\nIADD3 R1, R1, 1\n@P0 BRA `(.L_a)\n.L_b:\nFFMA R1, R2, R3, R1\nLDG.E R2\n@P0 BRA `(.L_b)\nEXIT")
    )
    found = machine_code._of_main_loop(code, machine_code.TENSOR_CORES, r"LDG\b", machine_code.SPILL)
    assert found == {"loop": 3, "loop_mma": 0, "loop_loads": 1, "loop_spills": 0}


AMD = """
kernel:
.LBB0_0:
\ts_load_dword s0, s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_19
\ts_branch .LBB0_20
.LBB0_18:                               ;   in Loop: Header=BB0_19 Depth=1
\tv_mfma_f32_32x32x8_bf16 v[18:33], v[86:87], v[70:71], v[18:33]
\ts_cbranch_scc0 .LBB0_20
.LBB0_19:                               ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[38:41], v[6:7], off
\ts_cbranch_execz .LBB0_18
\tv_mfma_f32_32x32x8_bf16 v[18:33], v[86:87], v[70:71], v[18:33]
\ts_branch .LBB0_18
.LBB0_20:
\ts_endpgm
    .private_segment_fixed_size: 24
    .sgpr_spill_count: 1
    .vgpr_count:     120
    .vgpr_spill_count: 2
"""


def test_amds_assembly() -> None:
    """The loop returns to its first instruction without a jump, as LLVM places it."""
    assert loops(parse_amdgcn(AMD)) == [frozenset(range(3, 9))]
    found = machine_code.read_amdgcn(AMD)
    assert (found["regs"], found["stack"], found["spills"], found["mma"]) == (120, 24, 3, 2)
    assert (found["loop"], found["loop_mma"], found["loop_loads"]) == (6, 2, 1)


@pytest.mark.parametrize(
    "arch, regs, warps, shared, tensor_memory, programs",
    [
        ("sm_90", 164, 4, 104 << 10, 0, 2),  # by shared memory
        ("sm_90", 164, 4, 0, 0, 3),  # by registers
        ("sm_90", 128, 8, 0, 0, 2),
        ("sm_90", 129, 8, 0, 0, 1),
        ("sm_90", 24, 4, 0, 0, 16),  # by warps
        ("sm_86", 24, 4, 0, 0, 12),
        ("sm_80", 128, 8, 81 << 10, 0, 2),
        ("sm_80", 128, 8, 82 << 10, 0, 1),  # a kilobyte of each program is the system's
        ("sm_120", 96, 4, 99 << 10, 0, 1),
        ("sm_100", 96, 4, 16 << 10, 256, 2),  # by tensor memory
        ("gfx942", 130, 4, 0, 0, 3),
        ("gfx942", 128, 8, 0, 0, 2),
        ("gfx942", 32, 4, 24 << 10, 0, 2),
    ],
)
def test_programs_of_a_processor(arch: str, regs: int, warps: int, shared: int, tensor_memory: int, programs: int) -> None:
    assert programs_of_a_processor(arch, regs, warps, shared, tensor_memory) == programs


@pytest.mark.parametrize(
    "read, complaint",
    [
        (lambda: parse_sass("nvdisasm fatal"), "no instruction in 'nvdisasm fatal'"),
        (lambda: parse_sass(sass("BRA `(.L_x_7)")), r"jumps to labels that are not there: \['.L_x_7'\]"),
        (lambda: machine_code.read_sass(sass("EXIT"), "no info", ""), "cuobjdump names no registers or no stack: 'no info'"),
        (lambda: machine_code.read_sass(sass("XMMA R1\nEXIT"), USAGE, "mma.sync.aligned"), "the SASS has 0 that are known"),
        (lambda: machine_code.read_amdgcn(AMD.replace("vgpr_count", "count")), "no 'vgpr_count'"),
        (
            lambda: machine_code._output(sys.executable, "-c", "raise SystemExit('broken cubin')"),
            "exit code 1: broken cubin",
        ),
        (lambda: machine_code._output("/nowhere/nvdisasm", "-c"), "/nowhere/nvdisasm cannot be started"),
    ],
)
def test_what_cannot_be_read_is_an_error(read: Any, complaint: str) -> None:
    with pytest.raises(MachineCodeError, match=complaint):
        read()


def test_the_sweep_ends_with_one_error_that_names_the_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(launch: static.Launch, arch: str) -> None:
        raise RuntimeError("ptxas died")

    launch = static.Launch("module", "_some_kernel", (), (), Tile(T=16, F=32, ER=16))
    monkeypatch.setattr(static, "compile_for", failing)
    monkeypatch.setattr(static, "lines_of", lambda cases, archs, processes: map(static.line_of, [launch], archs))
    monkeypatch.setattr(sys, "argv", ["static", "--arch", "sm_80"])
    assert static.main() == 2
    error = rf"error: _some_kernel for sm_80 under Triton {triton.__version__}, Tile\(.*\): RuntimeError: ptxas died\n"
    assert re.fullmatch(error, capsys.readouterr().err)


GOOD: dict[str, Any] = {
    "kernel": "_wgrad_bwd_kernel", "arch": "sm_90", "config": {"types": "*bf16"}, "regs": 90, "spills": 0, "stack": 0,
    "shared": 1 << 10, "mma": 8, "wgmma": 8, "serialised": False, "loop": 100, "loop_mma": 8, "loop_loads": 0,
    "loop_spills": 0, "cp_async": 9, "programs": 2, "before_wait": 0,
    "undefined": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"spills": 9}, "spills"),
        ({"spills": 3, "loop_spills": 3}, "spills"),
        ({"stack": 24}, "stack"),
        ({"shared": (227 << 10) + 1}, "too much shared memory"),
        ({"arch": "sm_120", "shared": (99 << 10) + 1}, "too much shared memory"),
        ({"arch": "sm_80", "mma": 0}, "no tensor cores"),
        ({"wgmma": 0}, "no wgmma"),
        ({"serialised": True}, "serialised wgmma"),
        ({"programs": 0}, "does not fit a processor"),
        ({"before_wait": 1}, "touches memory before it waits"),
        ({"undefined": 2}, "reads a register that nothing wrote"),
    ],
)
def test_complaints(change: dict, complaint: str) -> None:
    assert static.complaints(GOOD) == static.complaints(GOOD | {"arch": "sm_89", "before_wait": 9}) == []
    assert static.complaints(GOOD | change) == [complaint]


def test_the_table_counts_serialised_kernels_and_shows_ranges() -> None:
    header, row = static.table([GOOD, GOOD | {"serialised": True, "loop": 120, "shared": 3 << 10}]).splitlines()
    assert row.split() == [
        "_wgrad_bwd_kernel",
        "sm_90",
        "2",
        "0",
        "0",
        "1",
        "90",
        "100-120",
        "8",
        "0",
        "8",
        "8",
        "9",
        "1-3",
        "2",
    ]
    for name, value in {
        "serialised": "1",
        "registers": "90",
        "loop": "100-120",
        "shared KB": "1-3",
        "programs": "2",
    }.items():
        assert row[: header.index(name) + len(name)].endswith(f" {value}"), name
