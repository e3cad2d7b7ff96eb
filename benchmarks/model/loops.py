"""The machine code of a kernel: its main loops, the instructions of one step, and the cycles that a warp alone needs for it.

A step is the route through a loop on which all tiles are aligned, of the kernel's dtype and inside their matrices: the one
with all of the loop's products and copies, and with as few other instructions as possible. How many of both it must have
follows from the sizes of the tiles; another number is an error.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from benchmarks.inspect.machine_code import Code, MachineCodeError, loops, parse_sass

PRODUCT = r"HMMA\b"
WAIT = r"(BAR|DEPBAR)\b"
COPY = r"LDGSTS\b.*\b128\b"
COMMIT = "LDGDEPBAR"
STORE = r"STG\b"
SLOW = r"(LDG|LD|STS)\b"  # a copy through registers (another dtype, unaligned or at an edge), or a store of the products

# Cycles from the issue of an instruction without a fixed latency until its result can be used, and the pipe that it takes
# with the cycles that a warp's instruction occupies it. GUESS: of the order that microbenchmarks of sm_80 and sm_90 report.
# Routes load only what a store adds to, under a predicate that is false where nothing is given: no latency then.
LATENCY = {"LDG": 0, "LDC": 28, "S2R": 25, "S2UR": 25, "LDSM": 33, "LDS": 29, "STS": 20, "STG": 20, "MUFU": 18, "SHFL": 25}
OTHER_LATENCY = 25
ALU = {
    "ISETP", "SEL", "LOP3", "IADD3", "LEA", "SHF", "VIADD", "PLOP3", "PRMT", "FSETP", "FMNMX", "IMNMX", "VIMNMX", "LOP",
    "MOV", "CS2R", "VOTE", "P2R", "R2P", "IABS", "F2FP",
}  # fmt: skip
FMA = {"IMAD", "FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"}
MEMORY = {"LDSM", "LDS", "STS", "LDG", "STG", "LDGSTS", "LD", "ST"}
TAKEN_BRANCH, BARRIER = 8, 25  # GUESS: cycles to fetch from elsewhere, and until all warps of a block have met


class Control(NamedTuple):
    """What the compiler tells the scheduler about one instruction."""

    stall: int  # cycles until the next instruction may issue
    writes: int  # the scoreboard that its result releases; 7: none
    reads: int  # the scoreboard that the reading of its operands releases; 7: none
    waits: int  # a bit for each scoreboard that must be free before it issues


class Listing(NamedTuple):
    """The instructions of a kernel, with the control of each."""

    name: str  # for errors
    code: Code
    controls: list[Control]
    loops: list[frozenset[int]]

    def texts(self, indices: Iterable[int]) -> list[str]:
        """The instructions at these indices."""
        return [self.code.instructions[i].text for i in indices]


class Step(NamedTuple):
    """What one warp does in a step."""

    instructions: float
    products: float  # HMMA
    copies: float  # of 16 bytes for each lane, to shared memory
    alone: float  # cycles of a warp that has the processor for itself
    alu: float  # cycles of a scheduler's integer pipe
    tensor: float  # cycles of a scheduler's tensor core
    shared: float  # bytes that pass the port of the shared memory


def read_listing(name: str, text: str) -> Listing:
    """One kernel's instructions of `nvdisasm -hex -c`."""
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s[^\n]*?/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/", text)
    code = parse_sass(text)
    if len(words) != len(code.instructions):
        raise MachineCodeError(f"{name}: {len(code.instructions)} instructions, but {len(words)} control words")
    return Listing(name, code, [_control(int(word, 16)) for word in words], loops(code))


def _control(word: int) -> Control:
    """Bits 41 to 57 of an instruction's second word, from sm_70 on: stall, yield, two scoreboards, and a mask of six."""
    bits = word >> 41
    return Control(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


def count(texts: Iterable[str], pattern: str) -> int:
    """The instructions that begin with a pattern."""
    return sum(re.match(pattern, text) is not None for text in texts)


class Route(NamedTuple):
    """The instructions that one pass through a part of a kernel executes, in order."""

    listing: Listing
    part: frozenset[int]  # of the kernel, that it leads through: a loop, or what is behind it
    indices: list[int]

    def count(self, pattern: str) -> int:
        """Its instructions that begin with a pattern."""
        return count(self.listing.texts(self.indices), pattern)


def find_step(listing: Listing, products: int, copies: int) -> Route:
    """The route through the one loop that has so many products and copies a step.

    A loop that the compiler unrolled by n has n times as many. A loop inside that multiplies runs as often as is needed.
    """
    found: list[Route] = []
    seen = []
    for loop in (loop for loop in listing.loops if count(listing.texts(loop), PRODUCT)):
        route = best_route(listing, loop, [min(loop)], _latches(listing, loop), _worth(None))
        pair = (0, 0) if route is None else (route.count(PRODUCT), route.count(COPY))
        seen.append("{} and {}".format(*pair))
        steps, rest = divmod(pair[1], copies)
        if route and steps and not rest:
            route = _with_products(route, products) if steps == 1 else route
            if route.count(PRODUCT) == steps * products:
                found.append(route)
    found = [route for route in found if not any(other.part < route.part for other in found)]
    if len(found) != 1:
        wanted = f"{products} tensor-core instructions and {copies} copies a step"
        loops_have = f"its loops have {'; '.join(seen) or 'no products'}"
        raise MachineCodeError(f"{listing.name}: {len(found)} loops with {wanted}, not one; {loops_have}")
    return found[0]


def _with_products(route: Route, products: int) -> Route:
    """The route on which a loop inside runs until there are so many products, or the route itself."""
    listing, indices = route.listing, route.indices
    inner = [loop for loop in listing.loops if loop < route.part and min(loop) in indices]
    for loop in inner:
        around = best_route(listing, loop, [min(loop)], _latches(listing, loop), _worth(None))
        each = 0 if around is None else around.count(PRODUCT)
        missing = products - route.count(PRODUCT)
        if around is not None and each and missing > 0 and missing % each == 0:
            place = indices.index(min(loop))
            return route._replace(indices=indices[:place] + around.indices * (missing // each) + indices[place:])
    return route


def longest(step: Route) -> Route:
    """The route of a step that has as many instructions as possible until it commits its copies.

    Where a kernel may make its addresses anew in a step, it does so on this route, and not on the one of `find_step`.
    """
    listing, loop = step.listing, step.part
    commit = next(i for i in step.indices if listing.code.instructions[i].text.startswith(COMMIT))
    copies = best_route(listing, loop, [min(loop)], [commit], _worth(None), shortest=False)
    rest = step.indices[step.indices.index(commit) + 1 :]
    if copies is None or copies.count(COPY) != step.count(COPY):
        raise MachineCodeError(f"{listing.name}: the longest route to the end of its copies has other copies")
    return step._replace(indices=copies.indices + rest)


def with_store(step: Route, widths: Iterable[int], stored: int) -> Route:
    """The route through the loop of a step on which each lane also stores so many bytes; see `epilogue`."""
    listing, loop = step.listing, step.part
    route = _storing(listing, loop, [min(loop)], _latches(listing, loop), widths, stored)
    route = _with_products(route, step.count(PRODUCT))
    if (route.count(PRODUCT), route.count(COPY)) != (step.count(PRODUCT), step.count(COPY)):
        raise MachineCodeError(f"{listing.name}: the step of its loop that stores has other products or copies")
    return route


def epilogue(step: Route, widths: Iterable[int], stored: int) -> Route:
    """What follows the loop of a step: the route to the end on which each lane stores so many bytes.

    They are stored `width` at a time, the first of the widths with which that is possible.
    """
    listing, behind = step.listing, frozenset(range(len(step.listing.controls))) - step.part
    ends = [i for i in behind if re.match("EXIT", listing.code.instructions[i].text)]
    exits = {j for i in step.part for j in _after(listing, i)} - step.part
    return _storing(listing, behind, exits, ends, widths, stored)


def _storing(
    listing: Listing, part: frozenset[int], starts: Iterable[int], ends: Iterable[int], widths: Iterable[int], stored: int
) -> Route:
    found = {}
    for width in widths:
        route = best_route(listing, part, starts, ends, _worth(width))
        texts = [] if route is None else listing.texts(route.indices)
        found[width] = sum(width for text in texts if _stores(text, width))
        if route is not None and found[width] == stored:
            return route
    most = ", ".join(f"{most} of {width} at a time" for width, most in found.items())
    raise MachineCodeError(f"{listing.name}: no route stores {stored} bytes a lane; the most are {most}")


def _stores(text: str, width: int) -> bool:
    return re.match(STORE, text) is not None and _width(text) == width


def _worth(width: int | None) -> Callable[[str], int | None]:
    """Whether a route shall have an instruction, or None where it must not.

    Without a width no store is allowed. With one the stores of others may lie on the route, under the opposite predicate,
    and so may loads, of what the product is added to; see LATENCY.
    """

    def worth(text: str) -> int | None:
        if re.match(rf"{SLOW}|{STORE}" if width is None else "STS", text):
            return None
        wanted = re.match(rf"{PRODUCT}|{COPY}|{WAIT}", text) is not None
        return int(wanted or (width is not None and _stores(text, width)))

    return worth


def best_route(
    listing: Listing, part: frozenset[int], starts: Iterable[int], ends: Iterable[int],
    worth: Callable[[str], int | None], shortest: bool = True,
) -> Route | None:  # fmt: skip
    """The route through a part of a kernel that is worth the most, if there is one.

    Of several it is the one with the fewest instructions, or with the most.
    """
    values = {i: worth(listing.code.instructions[i].text) for i in part}
    scores = {i: 10_000 * value + (-1 if shortest else 1) for i, value in values.items() if value is not None}
    after = {i: [j for j in _after(listing, i) if j in scores and not _returns(listing, i, j)] for i in scores}
    best: dict[int, tuple[int, int | None]] = {start: (scores[start], None) for start in starts if start in scores}
    for i in _in_order(after, list(best)):
        for j in after[i]:
            score = best[i][0] + scores[j]
            if j not in best or score > best[j][0]:
                best[j] = score, i
    reached = [end for end in ends if end in best]
    if not reached:
        return None
    at: int | None = max(reached, key=lambda end: best[end][0])
    indices = []
    while at is not None:
        indices.append(at)
        at = best[at][1]
    return Route(listing, part, indices[::-1])


def _after(listing: Listing, i: int) -> list[int]:
    one = listing.code.instructions[i]
    targets = [listing.code.labels[one.target]] if one.target is not None else []
    return [j for j in targets + [i + 1] * one.continues if j < len(listing.controls)]


def _latches(listing: Listing, loop: frozenset[int]) -> list[int]:
    """The instructions that return to a loop's first."""
    return [i for i in loop if min(loop) in _after(listing, i)]


def _returns(listing: Listing, i: int, j: int) -> bool:
    """Whether the edge from i to j begins another pass of a loop."""
    return j <= i and any(j == min(loop) and i in loop for loop in listing.loops)


def _in_order(after: Mapping[int, list[int]], starts: Iterable[int]) -> list[int]:
    """What can be reached, each instruction behind all that lead to it."""
    done: list[int] = []
    seen: set[int] = set()
    for start in starts:
        stack = [] if start in seen else [(start, iter(after[start]))]
        seen.add(start)
        while stack:
            i, rest = stack[-1]
            j = next((j for j in rest if j not in seen), None)
            if j is None:
                done.append(i)
                stack.pop()
            else:
                seen.add(j)
                stack.append((j, iter(after[j])))
    return done[::-1]


def step_of(route: Route, hmma_cycles: float, times: int = 1) -> Step:
    """One of the `times` steps that a route holds, in cycles of a pass that follows on others."""
    texts = route.listing.texts(route.indices)
    opcodes = [re.split(r"[.\s]", text, maxsplit=1)[0] for text in texts]
    before, after = (_cycles(route, opcodes, hmma_cycles, passes) for passes in (2, 3))
    alu = 2 * sum(opcode in ALU for opcode in opcodes)  # 16 lanes wide: two cycles for 32
    shared = sum(map(_shared_bytes, texts))
    products = count(texts, PRODUCT)
    found = (len(texts), products, count(texts, COPY), after - before, alu, products * hmma_cycles, shared)
    return Step(*(value / times for value in found))


def _shared_bytes(text: str) -> int:
    """The bytes of a warp's access to shared memory, if all lanes take part and no bank is asked twice."""
    found = re.match(r"(LDSM|LDS|STS|LDGSTS)\b", text)
    if found is None or text.startswith("LDS RZ"):  # ptxas puts three loads that never run in front of copies
        return 0
    if found[1] == "LDSM":
        matrices = re.search(r"\.MT?88\.(\d)", text)
        return 128 * (int(matrices[1]) if matrices else 1)
    return 32 * _width(text)


def _width(text: str) -> int:
    """The bytes that an instruction moves for one lane."""
    width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", text.split()[0])
    return int(width[1].lstrip("US")) // 8 if width else 4


def _cycles(route: Route, opcodes: list[str], hmma_cycles: float, passes: int) -> float:
    """When a warp that nothing else disturbs has issued the last instruction of so many passes."""
    now, scoreboards, free = 0.0, [0.0] * 6, defaultdict(float)
    for place, i in list(enumerate(route.indices)) * passes:
        opcode, control = opcodes[place], route.listing.controls[i]
        for board in range(6):
            if control.waits >> board & 1:
                now = max(now, scoreboards[board])
        pipe, occupied = _pipe(opcode, route.listing.code.instructions[i].text, hmma_cycles)
        now = max(now, free[pipe])
        free[pipe] = now + occupied
        latency = LATENCY.get(opcode, OTHER_LATENCY)
        if control.writes < 6:
            scoreboards[control.writes] = now + latency
        if control.reads < 6:
            scoreboards[control.reads] = max(scoreboards[control.reads], now + latency / 2)
        now += max(control.stall, 1)
        following = route.indices[(place + 1) % len(opcodes)]
        if opcode == "BRA" and following != i + 1:
            now += TAKEN_BRANCH
        if opcode == "BAR":
            now += BARRIER
    return now


def _pipe(opcode: str, text: str, hmma_cycles: float) -> tuple[str, float]:
    """The pipe of a scheduler that an instruction takes, and for how many cycles."""
    if opcode == "HMMA":
        return "tensor", hmma_cycles
    if opcode in ALU:
        return "alu", 2
    if opcode in FMA:
        return "fma", 2
    if opcode in MEMORY:
        return "memory", 8 if opcode == "LDSM" or "128" in text else 4
    return ("uniform", 2) if opcode.startswith("U") else ("other", 1)
