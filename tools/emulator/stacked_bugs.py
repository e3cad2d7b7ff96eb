"""Bugs in the addition of stacked mixtures: its barriers, its groups of tokens, its table of mixtures, its columns of y."""

from tools.emulator.bug import Bug

OUTSIDE = "AddressSanitizer: heap-buffer-overflow"


def _bug(
    name: str,
    function: str,
    right: str,
    wrong: str,
    caught_as: str = "y is off by",
    target: str = "quick",
    is_race: bool = False,
    first_problem: int = 1,
) -> Bug:
    """A bug of stacked.cuh."""
    file = "cuda/stacked.cuh"
    return Bug(name, file, function, right, wrong, caught_as, target, is_race, "stacked", first_problem)


STACKED_BUGS = (
    _bug(
        "mixtures mixed before the barrier of the grid",
        "stacked_kernel(",
        "grid_barrier();",
        "__syncthreads();",
        is_race=True,
    ),
    _bug(
        "mixtures expanded before their copies are seen by all threads",
        "stacked_kernel(",
        "        __syncthreads();\n",
        "",
        is_race=True,
    ),
    _bug(
        "the gates of the mixture before",
        "stacked_kernel(",
        "if (mixed != work.mixture)",
        "if (mixed < 0)",
    ),
    _bug(
        "a block that waits where others have returned",
        "stacked_kernel(",
        "if (used == 0) return;",
        "if (used == 0 && blockIdx.x > 0) return;",
        caught_as="waits for ever",
    ),
    _bug(
        "a token of another group stored",
        "void expand_stacked(",
        "if (p.token_group != nullptr && group_of_token(p, t) != group) return;",
        "",
    ),
    _bug(
        "the scale of the first token for all",
        "void expand_stacked(",
        "p.token_scale[t]",
        "p.token_scale[0]",
    ),
    _bug(
        "only the first token's group looked at",
        "uint32_t used_mixtures(",
        "smaller(t, p.T - 1)",
        "0",
    ),
    _bug(
        "groups read in 32 bits",
        "int64_t group_of_token(",
        "p.group_has_64_bits ?",
        "false ?",
    ),
    _bug(
        "rows of gates taken for those of no mixture",
        "UsedRows(const StackedParams& p, uint32_t used)",
        "gate_end = is_used ? gate + own.E : gate;",
        "gate_end = gate;",
        first_problem=5,
    ),
    _bug(
        "the first tiles of all columns",
        "bool next(",
        "(tile - own.first_tile)",
        "tile",
    ),
    _bug(
        "columns of y behind a mixture's last",
        "bool next(",
        "smaller(own.count - begin, p.column_tile)",
        "p.column_tile",
        caught_as=OUTSIDE,
        target="address",
    ),
    _bug(
        "mixtures copied from a row of lora_b that is too far",
        "void load_stacked(",
        "own.b + work.first - own.column",
        "own.b + work.first",
        caught_as=OUTSIDE,
        target="address",
    ),
)
