"""The GPU that is not there: kernels are compiled for it and reach its driver."""

import pytest

pytest.importorskip("triton")

from tests.triton.compiling import run_compiled

PROGRAM = """
import torch
from lmoe_kernels import lmoe
from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.plans import Chip
from tools.stubbed_gpu import stubbed_gpu

tensors = torch.randn(2, 16), torch.randn(2, 4, 16), torch.randn(2, 4, 16)
with stubbed_gpu({chip}) as gpu:
    lmoe(*tensors, gate_weight=torch.randn(2, 16), backend="triton")
    print(gpu.launches(), gpu.early_launches(), host.chip_of(tensors[0].device).arch, gpu.get_current_target().arch)
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


def test_launches_reach_the_driver_until_the_block_ends() -> None:
    assert run_compiled(PROGRAM.format(chip="Chip('sm_80', 108, 163 << 10)")) == ["1 0 sm_80 80", *AFTER]  # one pass


def test_nothing_is_compiled_on_request(tmp_path) -> None:
    cache = tmp_path / "cache"
    assert run_compiled(PROGRAM.format(chip="compiles=False"), TRITON_CACHE_DIR=str(cache)) == ["0 0 sm_90 90", *AFTER]
    assert not list(cache.rglob("*.cubin"))
