"""The Triton kernels compiled ahead of time for GPUs that need not be here: no spills, no stack, tensor cores in use.

In processes of their own, since here Triton interprets. `make test` takes five calls on Hopper and one on some other chips;
all configurations of `benchmarks.inspect.static` are for `make static`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from lmoe_kernels.backends.triton import wgrad

KERNELS = {
    "_one_pass_fwd_kernel", "_shrink_mix_fwd_kernel", "_shrink_fwd_kernel", "_mix_fwd_kernel", "_expand_fwd_kernel",
    "_shrink_mix_bwd_kernel", "_mix_bwd_kernel", "_wgrad_bwd_kernel", "_reduce_bwd_kernel", "_route_fwd_kernel",
    "_group_fwd_kernel", "_grouped_shrink_fwd_kernel", "_grouped_mix_fwd_kernel", "_grouped_expand_fwd_kernel",
    "_grouped_mix_bwd_kernel", "_grouped_wgrad_bwd_kernel", "_dropout_kernel",
    "_stacked_shrink_fwd_kernel", "_stacked_mix_fwd_kernel", "_stacked_expand_fwd_kernel",
}  # fmt: skip


def compiled(*arguments: str) -> tuple[list[dict], str]:
    """The rows of `python -m benchmarks.inspect.static`, and its complaints."""
    printed, complaints = _run("-m", "benchmarks.inspect.static", "--processes", "1", *arguments)
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {row["triton"] for row in rows} == {triton.__version__}
    return rows, complaints


def _run(*arguments: str) -> tuple[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout, done.stderr


def assert_tiles_come_by_cp_async(rows: list[dict]) -> None:
    """On NVIDIA's chips no loop of products loads its tiles into registers, which leave no room for several stages.

    An expand reads in its loop the output that it adds to: the operand of a sum, not of a product.
    """
    of_products = [row for row in rows if row["loop_mma"] and not row["arch"].startswith("gfx")]
    by_registers = {row["kernel"] for row in of_products if row["loop_loads"]}
    assert by_registers <= {"_grouped_expand_fwd_kernel", "_stacked_expand_fwd_kernel"}
    assert all(row["cp_async"] for row in of_products if row["kernel"] in by_registers)


def test_five_calls_on_hopper() -> None:
    rows, complaints = compiled("--quick", "--arch", "sm_90")
    assert complaints == ""
    assert {row["kernel"] for row in rows} >= KERNELS - {"_one_pass_fwd_kernel"}
    of_stacks = [row for row in rows if row["kernel"] == "_stacked_shrink_fwd_kernel"]
    assert {row["config"]["GATE_WITH_A"] for row in of_stacks} == {False, True}
    assert_tiles_come_by_cp_async(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120", "gfx942"])
def test_one_call_elsewhere(arch: str) -> None:
    rows, complaints = compiled("--one", "--arch", arch)
    assert complaints == ""
    assert {row["arch"] for row in rows} == {arch}
    assert_tiles_come_by_cp_async(rows)


CHANGED = """
import sys
from dataclasses import replace
from benchmarks.inspect import static
sys.path.insert(0, sys.argv[1])
kernels = {launch.kernel: launch for launch in static.launches(eval("static." + sys.argv[2]), static.CHIPS["sm_90"])}
print(static.complaints(static.line_of(replace(kernels["_wgrad_bwd_kernel"], module="changed"), "sm_90")))
"""


def complaints_of_changed_wgrad(lines: list[str], case: str, folder: Path) -> str:
    """What is wrong with the kernel of a call for sm_90, if the text of its module is changed."""
    (folder / "changed.py").write_text("\n".join(lines), encoding="utf-8")
    return _run("-c", CHANGED, str(folder), case)[0].strip()


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="ptxas of other versions serialises nothing here")
def test_a_split_that_may_have_no_tokens_serialises_wgmma(tmp_path: Path) -> None:
    """The kernel's own text without its assumption."""
    lines = Path(wgrad.__file__).read_text(encoding="utf-8").splitlines()
    without = [line.replace("tl.assume(t_to > t_from)", "pass") for line in lines]
    assert without != lines
    assert complaints_of_changed_wgrad(without, "case(T=16384)", tmp_path) == "['serialised wgmma']"


def test_no_product_of_a_weight_gradient_reads_a_descriptor_that_nothing_wrote(tmp_path: Path) -> None:
    """An H200 gave a wrong gradient where the first product came before the gate's coefficients were loaded."""
    lines = Path(wgrad.__file__).read_text(encoding="utf-8").splitlines()
    assert complaints_of_changed_wgrad(lines, "UNALIGNED[0]", tmp_path) == "[]"
    load, product = (
        next(i for i, line in enumerate(lines) if line.strip().startswith(start))
        for start in ("c = load_rows(coefficients_ptr", "acc = tl.dot(x, c, acc")
    )
    lines.insert(load + 1, lines.pop(product))
    assert complaints_of_changed_wgrad(lines, "UNALIGNED[0]", tmp_path) == "['reads a register that nothing wrote']"


@pytest.mark.slow
def test_every_configuration_on_every_chip() -> None:
    rows, complaints = compiled()
    assert complaints == ""
    assert {row["kernel"] for row in rows} == KERNELS
