"""Bugs put into copies of the kernels, one at a time: what the emulator must catch."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tools.emulator.build import CSRC

PROBLEMS = 4


@dataclass(frozen=True)
class Bug:
    """A change of one place in csrc/, and what is said where it is caught.

    The place is code within one function, which the copy has without its comments: another comment, or another function with
    the same line, is none of a bug's business.
    """

    name: str
    file: str
    function: str  # enough of its head to find it by, with the opening parenthesis
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
        text = re.sub(r"[ \t]*//.*", "", path.read_text())
        begin, end = self._body(text)
        body, place = text[begin:end], f"{self.name}: {self.function}...)"
        assert body.count(self.right) == 1, f"{place} has {body.count(self.right)} times {self.right!r}"
        path.write_text(text[:begin] + body.replace(self.right, self.wrong) + text[end:])
        return csrc

    def _body(self, text: str) -> tuple[int, int]:
        """Where the function's body begins and ends."""
        count = text.count(self.function)
        assert count == 1, f"{self.name}: {self.file} has {count} times {self.function!r}"
        begin = text.index("{\n", text.index(self.function))
        depth = 0
        for at in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return begin, at
        raise AssertionError(f"{self.name}: {self.function}...) does not end")


BUGS = (
    Bug(
        "a barrier removed from the pipeline",
        "cuda/tiles.cuh",
        "void pipeline(",
        "__syncthreads();",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a wait that is off by one",
        "cuda/tiles.cuh",
        "void pipeline(",
        "copy_async_wait<DEPTH - 2>();",
        "copy_async_wait<DEPTH - 1>();",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a wrong stage, still being read",
        "cuda/tiles.cuh",
        "float* run(",
        "S* stage = reinterpret_cast<S*>(smem + step % STAGES * STAGE_BYTES);\n                const",
        "S* stage = reinterpret_cast<S*>(smem + (step + 1) % STAGES * STAGE_BYTES);\n                const",
        "is off by",
    ),
    Bug(
        "an output over stages that are still being read",
        "cuda/tiles.cuh",
        "float* run(",
        "__syncthreads();\n        float* out",
        "float* out",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a first step that waits for nobody, not for mix either",
        "cuda/tiles.cuh",
        "void pipeline(",
        "        if (step >= 0) {\n",
        "        if (step > 0) {\n",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a swept output read before it is whole",
        "cuda/tiles.cuh",
        "void sweep(",
        "__syncthreads();",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "gates mixed before they are there",
        "cuda/stages.cuh",
        "void gate_softmax(",
        "__syncthreads();",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "sums of parts mixed before they are stored",
        "cuda/stages.cuh",
        "void sum_parts(",
        "__syncthreads();",
        "",
        "is off by",
        is_race=True,
        first_problem=16,
    ),
    Bug(
        "a load without a mask",
        "cuda/tiles.cuh",
        "Place of(",
        "row < last_row ? m.columns - col : 0;",
        "m.columns - col;",
        "AddressSanitizer: heap-buffer-overflow",
        "address",
    ),
    Bug(
        "a barrier in one warp only",
        "cuda/backward.cuh",
        "void mix_tokens_bwd(",
        "__syncthreads();\n    for (int i = threadIdx.x; i < tokens * E;",
        "if (threadIdx.x < 32) __syncthreads();\n    for (int i = threadIdx.x; i < tokens * E;",
        "exits while others wait in __syncthreads",
    ),
    Bug(
        "lanes missing from a shuffle",
        "cuda/decode.cuh",
        "void shrink_chunk(",
        "__shfl_xor_sync(~0u,",
        "__shfl_xor_sync(0xffffu,",
        "the calling lane is not in its mask",
    ),
    Bug(
        "no barrier of the grid",
        "cuda/decode.cuh",
        "decode_fwd_kernel(",
        "grid_barrier();",
        "__syncthreads();",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a barrier of the grid that one block does not reach",
        "cuda/decode.cuh",
        "decode_fwd_kernel(",
        "grid_barrier();",
        "if (blockIdx.x + 1 < gridDim.x) grid_barrier();",
        "waits for ever",
    ),
    Bug(
        "a barrier of the grid in a launch that is not cooperative",
        "cuda/decode.cu",
        "void decode(",
        'check("decode_fwd_kernel", launch_cooperative(kernel, dim3(p.blocks), dim3(DECODE_THREADS), smem, stream, p));',
        'LAUNCH(kernel, dim3(p.blocks), dim3(DECODE_THREADS), smem, stream, p); check_launch("decode_fwd_kernel");',
        "a grid-wide barrier in a launch that is not cooperative",
    ),
)
