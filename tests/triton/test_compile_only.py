"""The Triton kernels compiled ahead of time for GPUs that need not be here: no spills, no stack, tensor cores in use.

In a process of its own, since here Triton interprets. `make test` takes three calls on Hopper and one on the other chips;
all configurations of `benchmarks.inspect.static` are for `make static`.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_one_pass_fwd_kernel", "_shrink_mix_fwd_kernel", "_shrink_fwd_kernel", "_mix_fwd_kernel", "_expand_fwd_kernel",
    "_shrink_mix_bwd_kernel", "_mix_bwd_kernel", "_wgrad_bwd_kernel", "_reduce_bwd_kernel", "_route_fwd_kernel",
    "_group_fwd_kernel", "_grouped_shrink_fwd_kernel", "_grouped_mix_fwd_kernel", "_grouped_expand_fwd_kernel",
    "_grouped_mix_bwd_kernel", "_grouped_wgrad_bwd_kernel",
}  # fmt: skip


def compiled(*arguments: str) -> tuple[list[dict], str]:
    """The rows of `python -m benchmarks.inspect.static`, and its complaints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.inspect.static", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def test_three_calls_on_hopper() -> None:
    rows, complaints = compiled("--quick", "--arch", "sm_90")
    assert complaints == ""
    assert {row["kernel"] for row in rows} >= KERNELS - {"_shrink_mix_fwd_kernel"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_one_call_elsewhere(arch: str) -> None:
    rows, complaints = compiled("--one", "--arch", arch)
    assert complaints == ""
    assert {row["arch"] for row in rows} == {arch}


@pytest.mark.slow
def test_every_configuration_on_every_chip() -> None:
    rows, complaints = compiled()
    assert complaints == ""
    assert {row["kernel"] for row in rows} == KERNELS
