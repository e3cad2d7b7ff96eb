"""The limits that are measured: on a CPU without the L2's, whose kernel reads here in Triton's interpreter."""

import pytest
import torch

from benchmarks.measuring import limits

pytest.importorskip("triton")

from benchmarks.measuring.l2 import BLOCK, read_repeatedly


def test_every_block_is_read_and_counted() -> None:
    """Five blocks of other sums, by three programs that begin one after another and step by their number."""
    buffer = torch.arange(5.0).repeat_interleave(BLOCK)
    sums, read = read_repeatedly(buffer, programs=3, times=4)
    blocks = [[(program + 3 * i) % 5 for i in range(4)] for program in range(3)]
    assert sums.tolist() == [BLOCK * sum(of_one) for of_one in blocks]
    assert read == 3 * 4 * BLOCK * 4
    assert {block for of_one in blocks for block in of_one} == set(range(5))


def test_a_cpu_has_no_limit_of_the_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cache_bytes", lambda device: 2**10)
    found = limits.measure_limits(torch.device("cpu"), ["float32"], quick=True)
    assert found.cache_bytes_per_s is None
    assert found.copy_bytes_per_s > 0
    assert set(found.gemm_flops_per_s) == set(found.narrow_flops_per_s) == {"float32"}


def test_the_limit_of_the_l2_counts_what_the_kernel_reads() -> None:
    """The time is that of one call."""
    processors = type("Properties", (), {"multi_processor_count": 2})
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch.cuda, "get_device_properties", lambda device: processors)
        patches.setattr(limits, "READS", 3)
        patches.setattr(torch, "zeros", lambda size, device: torch.ones(size))
        rate = limits._cache_bytes_per_s(torch.device("cuda"), 32 * BLOCK, lambda call: 0.5)
    assert rate == 16 * 3 * BLOCK * 4 / 0.5
