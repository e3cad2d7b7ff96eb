"""The GPU that is not there: kernels are compiled for it and reach its driver. In processes in which Triton compiles."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tools import stubbed_gpu

PROGRAM = """
import torch
from lmoe_kernels import lmoe
from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.configs import Chip
from tools.stubbed_gpu import stubbed_gpu

tensors = torch.randn(2, 16), torch.randn(2, 4, 16), torch.randn(2, 4, 16)
with stubbed_gpu({chip}) as gpu:
    lmoe(*tensors, gate_weight=torch.randn(2, 16), backend="triton")
    print(gpu.launches(), host.chip_of(tensors[0].device).arch, gpu.get_current_target().arch)
print(host.chip_of(tensors[0].device).arch)
try:
    lmoe(*tensors, gate_weight=torch.randn(2, 16), backend="triton")
except ValueError as error:
    print(error)
"""
AFTER = [
    "interpreter",
    "lmoe: backend must be one that can take this call, got 'triton': its kernels run on GPUs, not on cpu",
]


def run_compiled(program: str, **environment: str) -> list[str]:
    """The lines that a program prints in a process in which Triton compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if stubbed_gpu.COMPILER is None:
        pytest.skip("no C compiler")


def test_launches_reach_the_driver_until_the_block_ends() -> None:
    assert run_compiled(PROGRAM.format(chip="Chip('sm_80', 108, 163 << 10)")) == ["2 sm_80 80", *AFTER]


def test_nothing_is_compiled_on_request(tmp_path) -> None:
    cache = tmp_path / "cache"
    assert run_compiled(PROGRAM.format(chip="compiles=False"), TRITON_CACHE_DIR=str(cache)) == ["0 sm_90 90", *AFTER]
    assert not list(cache.rglob("*.cubin"))
