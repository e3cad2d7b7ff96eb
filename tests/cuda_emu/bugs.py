"""Bugs put into copies of the kernels, one at a time: what the emulator must catch."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_emu.build import CSRC

PROBLEMS = 4


@dataclass(frozen=True)
class Bug:
    """A change of one place in csrc/, and what is said where it is caught."""

    name: str
    file: str
    right: str
    wrong: str
    caught_as: str  # a part of the driver's output
    target: str = "plain"
    is_race: bool = False  # in these problems, whatever the schedule: ThreadSanitizer sees it
    first_problem: int = 1  # of PROBLEMS that go where the bug is

    def __str__(self) -> str:
        return self.name

    def plant(self, folder: Path) -> Path:
        """A copy of csrc/ with the bug."""
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        path = csrc / self.file
        text = path.read_text()
        assert text.count(self.right) == 1, f"{self.name}: {self.file} has {text.count(self.right)} times {self.right!r}"
        path.write_text(text.replace(self.right, self.wrong))
        return csrc


BUGS = (
    Bug(
        "a barrier removed from the pipeline",
        "cuda/tiles.cuh",
        "            __syncthreads();  // this step's tiles are there for all, and nobody reads the last step's any more\n",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a wait that is off by one",
        "cuda/tiles.cuh",
        "copy_async_wait<DEPTH - 2>();",
        "copy_async_wait<DEPTH - 1>();",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a wrong stage, still being read",
        "cuda/tiles.cuh",
        "S* stage = reinterpret_cast<S*>(smem + step % STAGES * STAGE_BYTES);\n                const",
        "S* stage = reinterpret_cast<S*>(smem + (step + 1) % STAGES * STAGE_BYTES);\n                const",
        "is off by",
    ),
    Bug(
        "an output over stages that are still being read",
        "cuda/tiles.cuh",
        "        __syncthreads();  // the output takes the place of the stages\n",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a first step that waits for nobody, not for mix either",
        "cuda/tiles.cuh",
        "        if (step >= 0) {\n",
        "        if (step > 0) {\n",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a swept output read before it is whole",
        "cuda/tiles.cuh",
        "                __syncthreads();  // the output is there for all\n",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "gates mixed before they are there",
        "cuda/stages.cuh",
        "    __syncthreads();  // the gates are there for all\n",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "sums of parts mixed before they are stored",
        "cuda/stages.cuh",
        "    __syncthreads();  // what was stored can be read by the whole block\n",
        "",
        "is off by",
        is_race=True,
        first_problem=16,
    ),
    Bug(
        "a load without a mask",
        "cuda/tiles.cuh",
        "row < last_row ? m.columns - col : 0;",
        "m.columns - col;",
        "AddressSanitizer: heap-buffer-overflow",
        "address",
    ),
    Bug(
        "a barrier in one warp only",
        "cuda/backward.cuh",
        "    __syncthreads();  // h and dh are in scratch\n",
        "    if (threadIdx.x < 32) __syncthreads();\n",
        "exits while others wait in __syncthreads",
    ),
    Bug(
        "lanes missing from a shuffle",
        "cuda/decode.cuh",
        "__shfl_xor_sync(~0u,",
        "__shfl_xor_sync(0xffffu,",
        "the calling lane is not in its mask",
    ),
    Bug(
        "no barrier of the grid",
        "cuda/decode.cuh",
        "    grid_barrier();\n",
        "    __syncthreads();\n",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a barrier of the grid that one block does not reach",
        "cuda/decode.cuh",
        "    grid_barrier();\n",
        "    if (blockIdx.x + 1 < gridDim.x) grid_barrier();\n",
        "waits for ever",
    ),
    Bug(
        "a barrier of the grid in a launch that is not cooperative",
        "cuda/decode.cu",
        'check("decode_fwd_kernel", launch_cooperative(kernel, dim3(p.blocks), dim3(DECODE_THREADS), smem, stream, p));',
        'LAUNCH(kernel, dim3(p.blocks), dim3(DECODE_THREADS), smem, stream, p); check_launch("decode_fwd_kernel");',
        "a grid-wide barrier in a launch that is not cooperative",
    ),
)
