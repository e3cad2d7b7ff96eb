"""Reads out of a GPU's L2: how fast the processors together take the bytes that the memory has already delivered."""

# pyright: reportArgumentType=false
# A block that is passed to a kernel is an int, its parameter a constexpr.

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements


def read_repeatedly(buffer: Tensor, programs: int, times: int) -> tuple[Tensor, int]:
    """Let each of so many programs read so many blocks of an fp32 buffer, each program from another block on.

    Returns:
        the sum of what each program has read, so that no read can be left out, and the bytes that were read.
    """
    sums = buffer.new_empty(programs)
    _read_kernel[(programs,)](buffer, sums, buffer.numel() // BLOCK, times, BLOCK=BLOCK)
    return sums, programs * times * BLOCK * buffer.element_size()


@triton.jit
def _read_kernel(
    buffer_ptr,  # (blocks, BLOCK)
    sums_ptr,  # (programs), written
    blocks,
    times,
    BLOCK: tl.constexpr,
):
    """The sum of some blocks. They are read past the L1, which would answer for some of them."""
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(times):
        block = (tl.program_id(0) + i * tl.num_programs(0)) % blocks
        total += tl.load(buffer_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))
