"""The model of the CUDA engine: what it reads from machine code, what it makes of it, and what it says of both backends."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")  # brings the reader of instructions, and the tools

from benchmarks.inspect.machine_code import MachineCodeError
from benchmarks.model import __main__ as command
from benchmarks.model import cubins, report, torch_backend
from benchmarks.model.chips import CHIPS, GRID_BARRIER, LAUNCH_EAGER, LAUNCH_GRAPH, LOADED_LATENCY, resident_blocks
from benchmarks.model.cubins import Built, Kernel, kernel_of
from benchmarks.model.estimate import Phase, Work, estimate, floor_seconds
from benchmarks.model.kernels import EXPAND, Call, Machine, device_of, shrink_tile, wgrad_tile
from benchmarks.model.loops import Control, Step, epilogue, find_step, longest, read_listing, step_of, with_store
from benchmarks.rows.shapes import Shape
from lmoe_kernels.backends.cuda import extension
from tests.benchmarks.sass import listing
from tests.problems import Case, gradients, leaves_of, make_problem
from tools.emulator.launches import recorded

H100 = CHIPS["H100"]
SHAPE, FEW = (Shape(tokens, 4096, 4096, 8, 16, "bfloat16") for tokens in (512, 16))
# A loop with two ways to copy, of which the slow one has a loop of its own; a rest that is multiplied in a loop, too; and
# stores after some steps. Then stores of four bytes, or of two.
LOOP = """
    S2R R0, SR_TID.X
.L_step:
    DEPBAR.LE SB0, 0x0
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P0 BRA `(.L_slow)
    @!PT LDS RZ, [RZ]
    LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64], !P1
    LDGSTS.E.BYPASS.128 [R4+0x1000], desc[UR4][R6.64], !P1
    BRA `(.L_multiply)
.L_slow:
    LDG.E R8, desc[UR4][R2.64]
    STS.128 [R4], R8
    LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64], P2
    @P3 BRA `(.L_slow)
.L_multiply:
    @P4 BRA `(.L_rest)
    LDSM.16.M88.4 R12, [R10]
    LDSM.16.MT88.4 R16, [R11]
    HMMA.16816.F32.BF16 R20, R12, R16, R20
    HMMA.16816.F32.BF16 R24, R12, R18, R24
    HMMA.16816.F32.BF16 R28, R12, R16, R28
    BRA `(.L_end)
.L_rest:
    HMMA.16816.F32.BF16 R20, R12, R16, R20
    @P5 BRA `(.L_rest)
.L_end:
    @P6 BRA `(.L_next)
    @P0 LDG.E R31, desc[UR4][R2.64]
    STG.E.64 desc[UR4][R2.64], R20
.L_next:
    @P1 BRA `(.L_step)
    @P2 BRA `(.L_half)
    STG.E desc[UR4][R2.64], R20
    STG.E desc[UR4][R2.64+0x4], R21
    EXIT
.L_half:
    STG.E.U16 desc[UR4][R2.64], R20
    EXIT
"""


def test_control_words_are_those_that_nvdisasm_prints() -> None:
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
                                                            /* 0x000ff00000000800 */
        /*0010*/                   S2UR UR8, SR_CTAID.X ;   /* 0x00000000000879c3 */
                                                            /* 0x000e620000002500 */
        /*00d0*/                   UIMAD.WIDE.U32 UR8, UR8, 0x40, URZ ; /* 0x00000040080878a5 */
                                                            /* 0x002fc8000f8e003f */
    """
    assert read_listing("one", text).controls == [Control(8, 7, 7, 0), Control(1, 1, 7, 0), Control(4, 7, 7, 2)]


def test_a_step_is_the_way_of_the_asynchronous_copies_without_rests_and_stores() -> None:
    step = find_step(listing(LOOP), products=3, copies=2)
    found = step_of(step, hmma_cycles=6.0)
    assert (found.instructions, found.products, found.copies) == (16, 3, 2)
    assert found.tensor == 18
    assert found.shared == 2 * 512 + 2 * 512, "a load that never runs moves nothing"


def test_a_loop_that_is_unrolled_holds_several_steps() -> None:
    twice = LOOP.replace("HMMA.16816.F32.BF16 R28, R12, R16, R28", "FADD R1, R1, R1")
    route = find_step(listing(twice), products=1, copies=1)
    whole, half = step_of(route, 6.0), step_of(route, 6.0, times=2)
    assert (whole.products, whole.copies) == (2, 2)
    assert half == tuple(figure / 2 for figure in whole)


def test_addresses_that_a_step_makes_anew_lie_on_its_longest_route() -> None:
    """The stores behind the copies do not, nor does another number of copies."""
    sometimes = """
    .L_step:
        BAR.SYNC.DEFER_BLOCKING 0x0
        @P0 BRA `(.L_copy)
        IMAD.WIDE R2, R4, R5, R6
        IMAD.WIDE R2, R4, R5, R6
    .L_copy:
        LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]
        LDGDEPBAR
        HMMA.16816.F32.BF16 R20, R12, R16, R20
        @P1 BRA `(.L_next)
        FADD R1, R1, R1
    .L_next:
        @P2 BRA `(.L_step)
        EXIT
    """
    step = find_step(listing(sometimes), products=1, copies=1)
    shortest, whole = step_of(step, 4.0), step_of(longest(step), 4.0)
    assert (shortest.instructions, whole.instructions) == (7, 9)
    assert (whole.products, whole.copies) == (1, 1)


def test_a_loop_inside_a_step_runs_until_all_products_are_made() -> None:
    """Its HMMA are a third of the step's."""
    inside = """
    .L_step:
        BAR.SYNC.DEFER_BLOCKING 0x0
        LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]
    .L_multiply:
        LDSM.16.M88.4 R12, [R10]
        HMMA.16816.F32.BF16 R20, R12, R16, R20
        HMMA.16816.F32.BF16 R24, R12, R16, R24
        @P0 BRA `(.L_multiply)
        @P1 BRA `(.L_step)
        EXIT
    """
    found = step_of(find_step(listing(inside), products=6, copies=1), 4.0)
    assert (found.instructions, found.products, found.copies) == (3 + 3 * 4, 6, 1)
    with pytest.raises(MachineCodeError, match="its loops have 2 and 1; 2 and 0"):
        find_step(listing(inside), products=7, copies=1)


def test_a_loop_around_a_loop_is_not_a_step() -> None:
    around = LOOP.replace(".L_step:", ".L_tile:\nNOP\n.L_step:").replace("@P2 BRA `(.L_half)", "@P2 BRA `(.L_tile)")
    step = find_step(listing(around.partition(".L_half:")[0]), products=3, copies=2)
    assert step.count("NOP") == 0


@pytest.mark.parametrize("products, copies", [(3, 1), (4, 2), (2, 2)])
def test_a_loop_of_another_tile_is_an_error_that_names_the_kernel(products: int, copies: int) -> None:
    wanted = f"0 loops with {products} tensor-core instructions and {copies} copies a step, not one"
    expected = f"a_kernel: {wanted}; its loops have 3 and 2; 1 and 0"
    with pytest.raises(MachineCodeError, match=expected):
        find_step(listing(LOOP), products, copies)


def test_two_loops_of_one_tile_are_an_error() -> None:
    loop = LOOP.partition("    @P2 BRA")[0]
    again = loop.replace(".L_", ".L_again_")
    with pytest.raises(MachineCodeError, match="a_kernel: 2 loops with 3 tensor-core instructions and 2 copies a step"):
        find_step(listing(loop + again), products=3, copies=2)


def test_stores_are_found_by_their_width() -> None:
    step = find_step(listing(LOOP), products=3, copies=2)
    assert with_store(step, widths=(8,), stored=8).count("STG") == 1
    assert epilogue(step, widths=(4,), stored=8).count("STG") == 2
    assert epilogue(step, widths=(4, 2), stored=2).count("STG") == 1
    for find in (with_store, epilogue):
        with pytest.raises(MachineCodeError, match="a_kernel: no route stores 64 bytes a lane; the most are"):
            find(step, widths=(8,), stored=64)


def test_a_warp_alone_waits_for_what_its_control_words_say() -> None:
    """Each pass loads, waits for the load, and stalls; the load of the next pass waits for nothing."""
    program = """
    .L_step:
        LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] | stall=2
        LDSM.16.M88.4 R12, [R10] | stall=1 writes=0
        HMMA.16816.F32.BF16 R20, R12, R16, R20 | stall=5 waits={waits}
        @P1 BRA `(.L_step) | stall=5
        EXIT
    """
    alone = {}
    for waits in (0, 1, 2):
        step = find_step(listing(program.format(waits=waits)), products=1, copies=1)
        alone[waits] = step_of(step, hmma_cycles=4.0).alone
    assert alone[1] == alone[0] + 33 - 1, "the load takes 33 cycles, of which one had passed"
    assert alone[2] == alone[0], "of a scoreboard that nothing holds"


def _step(**figures: float) -> Step:
    return Step(**(dict.fromkeys(Step._fields, 0.0) | {"products": 1.0} | figures))


@pytest.mark.parametrize(
    "bound, step, in_flight, cycles",
    [
        ("one warp alone", _step(alone=100.0, instructions=10), 0, 100),
        ("copies under way", _step(alone=100.0), 2, LOADED_LATENCY / 2),
        ("issue", _step(alone=100.0, instructions=60), 0, 240),  # four warps a scheduler
        ("integer pipe", _step(alu=30.0), 0, 120),
        ("tensor cores", _step(tensor=30.0), 0, 120),
        ("shared memory", _step(shared=1280.0), 0, 160),  # sixteen warps of ten cycles
    ],
)
def test_what_binds_a_kernel_and_its_time(bound: str, step: Step, in_flight: int, cycles: float) -> None:
    """Two blocks of eight warps at once on each of 132 processors, and again; then a block on a few of them."""

    def seconds(blocks: int) -> tuple[float, str]:
        phase = Phase("a", [Work(1000, step, in_flight)])
        found = estimate(H100, "a", [phase], blocks=blocks, threads=256, resident=2, registers=1, shared=0, floor=0)
        return found.seconds, found.bound

    none = estimate(H100, "a", [Phase("a", ())], blocks=1, threads=256, resident=2, registers=1, shared=0, floor=0).seconds
    assert seconds(2 * 132) == (pytest.approx(none + 1000 * cycles / H100.clock), bound)
    assert seconds(4 * 132) == (pytest.approx(none + 2000 * cycles / H100.clock), bound)
    assert seconds(4 * 132 + 1)[0] > seconds(4 * 132)[0]


def test_phases_follow_one_another_and_few_blocks_draw_less() -> None:
    def found(*phases: Phase, blocks: int = 1320):
        return estimate(H100, "a", phases, blocks=blocks, threads=256, resident=2, registers=1, shared=0, floor=0)

    reads, sweeps, waits = Phase("reads", (), memory=3e6), Phase("sweeps", (), l2=22e6), Phase("waits", (), 1, 1, 2e-6)
    alone = [found(phase).seconds - found().seconds for phase in (reads, sweeps, waits)]
    assert alone == pytest.approx([1e-6, 4e-6, 2e-6])
    together = found(reads, sweeps, waits)
    assert together.seconds == pytest.approx(found().seconds + sum(alone))
    assert together.bound == "sweeps: L2"
    assert found(waits).bound == "latency"
    assert found(reads, blocks=33).seconds - found().seconds == pytest.approx(1e-6 * 132 * 5 / 8 / 33)


def test_blocks_that_fit_a_processor() -> None:
    """128 registers leave room for two blocks of 256 threads, 129 for one; so do 100 KB of shared memory on sm_80."""
    assert resident_blocks(128, 256, 80_000, "sm_90") == 2
    assert resident_blocks(129, 256, 80_000, "sm_90") == 1
    assert resident_blocks(128, 256, 100_000, "sm_90") == 2
    assert resident_blocks(128, 256, 100_000, "sm_80") == 1


def test_kernels_are_known_by_their_symbols() -> None:
    assert kernel_of("_ZN4lmoe13shrink_kernelI13__nv_bfloat16Li144EEEvNS_12ShrinkParamsE") == ("shrink", "bf16", (144,))
    assert kernel_of("_ZN4lmoe14mix_fwd_kernelIfEEvNS_13ForwardParamsE") == ("mix_fwd", "fp32", ())
    assert kernel_of("$__internal_0_$__cuda_sm20_div_u16") is None


def test_the_tiles_are_those_of_the_sources() -> None:
    """A warp of eight multiplies 32 x 72 x 64 in a step of 144 columns; half of the threads make a fifth copy."""
    assert (shrink_tile(144).products, shrink_tile(144).copies(), shrink_tile(144).accumulators) == (72, 9, 72)
    assert (EXPAND.products, EXPAND.copies(), EXPAND.copies(left=False)) == (64, 8, 4)
    assert wgrad_tile(64).copies() == 6
    with pytest.raises(MachineCodeError, match="csrc must set NO_SUCH_SIZE to one number"):
        cubins.constant("NO_SUCH_SIZE")


class _Stub(Machine):
    """A machine whose kernels all have 64 registers and the same steps."""

    def __init__(self) -> None:
        super().__init__("sm_90", {})

    def built(self, name: str, *sizes: int) -> Built:
        return Built(Kernel(name, "bf16", sizes), self.arch, 64, 0, "")

    def _once(self, key: object, *_: object) -> Step:
        return _step(alone=100.0)


@pytest.mark.parametrize(
    "tokens, out_features, experts, processors, path",
    [
        (2, 500, 8, 3, "decode"), (300, 80, 8, 1, "one pass"), (300, 80, 8, 7, "stages"), (300, 80, 8, 40, "stages"),
        (300, 700, 8, 7, "stages"), (300, 500, 16, 7, "stages"),
    ],
)  # fmt: skip
def test_the_model_knows_the_kernels_that_are_launched(
    tokens: int, out_features: int, experts: int, processors: int, path: str, emulated_cuda: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In this order, with so many blocks and this much shared memory."""
    chip = H100._replace(processors=processors)
    monkeypatch.setattr(extension, "device_of", lambda index: device_of(chip))
    problem = make_problem(Case(T=tokens, I=72, O=out_features, E=experts, R=16), torch.bfloat16)
    leaves = leaves_of(problem.tensors)
    with recorded(emulated_cuda) as calls:
        gradients(problem, problem.call("cuda", **leaves), leaves)
    call = Call(chip, _Stub(), Shape(tokens, 72, out_features, experts, 16, "bfloat16"))
    (modelled_path, forward), (_, backward) = call.forward(), call.backward()
    assert modelled_path == path
    expected = [(f"{kernel.kernel.split('[')[0]}_kernel", kernel.blocks, kernel.shared) for kernel in (*forward, *backward)]
    names = {"cooperative": "decode_fwd_kernel"}
    found = [(names.get(one.kernel, one.kernel), one.blocks, one.shared_bytes) for one in calls.launches]
    assert found == expected


def test_decode_waits_for_the_grids_barrier_once() -> None:
    shape = Shape(1, 4096, 4096, 8, 16, "bfloat16")
    _, (one,) = Call(H100, _Stub(), shape).forward()
    assert one.seconds > GRID_BARRIER + floor_seconds(H100, shape, "forward")


def test_a_row_as_text_and_as_json(tmp_path: Path) -> None:
    shape = Shape(512, 4096, 4096, 8, 16, "bfloat16")
    row = report.Row(H100, shape, "forward", *Call(H100, _Stub(), shape).forward())
    kernels, operations = len(row.kernels), len(torch_backend.operations(shape)[0])
    (eager, torch_eager), (graph, torch_graph) = row.totals(graph=False), row.totals(graph=True)
    assert eager - graph == pytest.approx(kernels * (LAUNCH_EAGER - LAUNCH_GRAPH))
    assert torch_eager - torch_graph == pytest.approx(operations * (LAUNCH_EAGER - LAUNCH_GRAPH))
    text = f"{report.table(row)}\n{report.summary([row])}"
    assert all(kernel.kernel in text for kernel in row.kernels)
    assert text.count("cuda is faster") == 2
    slow = row._replace(kernels=[row.kernels[0]._replace(seconds=1.0)])
    assert "TORCH is faster" in report.table(slow)
    report.write(tmp_path / "new", "model", text, {"rows": [row.record()]})
    assert (tmp_path / "new" / "model.txt").read_text() == text + "\n"
    (written,) = json.loads((tmp_path / "new" / "model.json").read_text())["rows"]
    assert written["cuda_eager_us"] == pytest.approx(1e6 * eager)
    assert written["kernels"][0]["step"]["alone"] == 100


def test_the_operations_of_the_torch_backend_are_counted() -> None:
    shape = Shape(512, 256, 384, 8, 16, "bfloat16")
    T, I, O, E, R, _ = shape.sizes  # noqa: E741
    both = torch_backend.operations(shape)
    for found, times in zip(both, (1, 2), strict=True):
        products = [one for one in found if one.name in torch_backend.PRODUCTS]
        assert sum(one.flops for one in products) == times * 2 * T * ((E * R + E) * I + E * R * O)
        names = {one.name for one in found}
        assert "_softmax" in names
        assert not names & {"view", "t", "unsqueeze", "empty", "squeeze"}, "they launch nothing"
        assert all(one.seconds(H100) >= 1e-6 for one in found)
    first = both[0][0]
    assert (first.name, first.narrow) == ("mm", True)
    assert first.bytes == 2 * (T * I + E * R * I + T * E * R)


def test_the_floor_is_of_bytes_or_of_products() -> None:
    large = Shape(8192, 4096, 4096, 8, 16, "bfloat16")
    parameters = 136 * 4096 + 128 * 4096
    assert floor_seconds(H100, large, "forward") == pytest.approx(2 * (8192 * 8192 + parameters) / 3e12)
    assert floor_seconds(H100, large, "backward") == pytest.approx(2 * (8192 * 3 * 4096 + 2 * parameters) / 3e12)
    many = Shape(8192, 4096, 4096, 16, 64, "bfloat16")
    assert floor_seconds(H100, many, "backward") == pytest.approx(4 * 8192 * (1040 + 1024) * 4096 / 798e12)


def test_two_runs_next_to_one_another() -> None:
    rows = [report.Row(H100, shape, "forward", *Call(H100, _Stub(), shape).forward()).record() for shape in (SHAPE, FEW)]
    after = {"commit": "new", "date": "2026-11-27", "rows": rows}
    before = {"commit": "old", "date": "2026-11-26", "rows": [rows[0] | {"cuda_us": 10 * rows[0]["floor_us"]}]}
    text = report.comparison(before, after)
    head, _, _, _, _, first, second = text.splitlines()
    assert "nothing was measured: commit old of 2026-11-26, and commit new of 2026-11-27" in head
    assert report.MEASURED in text
    floor, cuda, torch_us = (rows[0][key] for key in ("floor_us", "cuda_us", "torch_us"))
    found = re.findall(r"[\d.]+", first.partition("bfloat16")[2])
    assert [float(figure) for figure in found] == pytest.approx(
        [floor, 10 * floor, 10, cuda, 100 * floor / cuda, torch_us, 3, rows[0]["torch_launches"]], abs=0.5
    )
    assert second.split("bfloat16")[1].split()[1:3] == ["-", "-"], "the earlier run has no such row"


def test_an_earlier_run_must_be_a_file(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--before", str(tmp_path / "missing.json")])
    assert "missing.json is no file" in capsys.readouterr().err


def test_without_a_compiler_the_command_says_what_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cubins, "tool", lambda name: None if name == "nvcc" else name)
    assert command.main([]) == 2
    assert capsys.readouterr().err == ("error: nvcc of the CUDA toolkit must be in PATH, to compile csrc/ and to read it\n")
