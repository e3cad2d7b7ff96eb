"""Bugs that are put into copies of the kernels, one at a time, and must be caught by the emulator."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tools.emulator.build import CSRC

PROBLEMS = 4


@dataclass(frozen=True)
class Bug:
    """A change of one place in csrc/, and the message that shows that it was caught.

    The place is found by its code within one function, in a copy without comments. So neither a new comment nor the same
    line in another function makes the place ambiguous.
    """

    name: str
    file: str
    function: str  # the part of its signature that ends with the opening parenthesis
    right: str
    wrong: str
    caught_as: str  # a part of the driver's output
    target: str = "plain"
    is_race: bool = False  # ThreadSanitizer finds it, whatever the schedule
    first_problem: int = 1  # the first of PROBLEMS that execute the place

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
        assert body.count(self.right) == 1, f"{place} contains {self.right!r} {body.count(self.right)} times"
        path.write_text(text[:begin] + body.replace(self.right, self.wrong) + text[end:])
        return csrc

    def _body(self, text: str) -> tuple[int, int]:
        """The positions where the function's body begins and ends."""
        count = text.count(self.function)
        assert count == 1, f"{self.name}: {self.file} contains {self.function!r} {count} times"
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
        "an output written over stages that are still being read",
        "cuda/tiles.cuh",
        "float* run(",
        "__syncthreads();\n        float* out",
        "float* out",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a first step without its wait, which is also the barrier after mix",
        "cuda/tiles.cuh",
        "void pipeline(",
        "        if (step >= 0) {\n",
        "        if (step > 0) {\n",
        "is off by",
        is_race=True,
    ),
    Bug(
        "a swept output read before it is complete",
        "cuda/tiles.cuh",
        "void sweep(",
        "__syncthreads();",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "gates mixed before they are stored",
        "cuda/stages.cuh",
        "void gate_softmax(",
        "__syncthreads();",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "reduced partial sums mixed before they are stored",
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
        "Span of(",
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
    Bug(
        "a bias added once for each part of a split sum",
        "cuda/forward.cuh",
        "mix_fwd_kernel(",
        "save_projection<S>(p, t, column, sum);",
        "const int64_t e = column - p.experts_of_a * p.R;\n"
        "for (int64_t part = 1; e >= 0 && part < p.shrink_parts; ++part) sum = logit_of<S>(p, e, sum);\n"
        "save_projection<S>(p, t, column, sum);",
        "logits is off by",
        first_problem=17,
    ),
    Bug(
        "a bias missing in decode",
        "cuda/decode.cuh",
        "void mix_decode(",
        "logit_of<S>(p, c - u_columns, totals[j])",
        "totals[j]",
        "y is off by",
        first_problem=35,
    ),
    Bug(
        "the sums of chunks added before they are stored",
        "cuda/decode.cuh",
        "void shrink_decode(",
        "__syncthreads();",
        "",
        "is off by",
        is_race=True,
    ),
    Bug(
        "the sums of chunks overwritten by those of the next rows",
        "cuda/decode.cuh",
        "void shrink_decode(",
        "other ^= DECODE_WARPS",
        "other = 0",
        "y depends on the schedule",
        is_race=True,
        first_problem=45,
    ),
    Bug(
        "a token that is computed for another, stored beyond the last",
        "cuda/decode.cuh",
        "void expand_tile(",
        "smaller(TOKENS, T - t0)",
        "TOKENS",
        "AddressSanitizer: heap-buffer-overflow",
        "address",
    ),
    Bug(
        "a row read behind the last one of the factors",
        "cuda/decode.cuh",
        "void shrink_decode(",
        "if (c < rows && aligned",
        "if (aligned",
        "AddressSanitizer: heap-buffer-overflow",
        "address",
    ),
)
