"""Every kernel of a call: its blocks, its bytes and its steps, by the plans of `backends/cuda/configs.py`.

The sizes of tiles are read from the sources, and the instructions of a step from the machine code. A loop that has not the
products and copies of such a tile is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from benchmarks.inspect.machine_code import MachineCodeError
from benchmarks.model import mix
from benchmarks.model.chips import HMMA, SHARED_MEMORY, Chip, resident_blocks
from benchmarks.model.cubins import Built, Kernel, constant
from benchmarks.model.decode import phases_of_decode
from benchmarks.model.estimate import Estimate, Phase, Work, ceil_div, estimate, floor_seconds
from benchmarks.model.loops import PRODUCT, Route, Step, epilogue, find_step, longest, step_of, with_store
from benchmarks.rows.shapes import Shape
from lmoe_kernels.backends.cuda import configs
from lmoe_kernels.backends.cuda.extension import Device

SIZE = 2  # bytes of an element: the model is of bf16
VECTOR = 16  # bytes of a copy to shared memory
PAIRS = (8,)  # bytes of a store of y and dx: four columns
STEP = 128 // SIZE  # elements of the sum in a step: 128 bytes of a row, csrc/cuda/copies.cuh


@dataclass(frozen=True)
class Tile:
    """The product of a block, EXTENT x columns. An operand lies along the sum, or across it."""

    columns: int
    left_along: bool
    right_along: bool

    @property
    def products(self) -> int:
        """Tensor-core instructions of a warp in a step, each 16 x 8 x 16."""
        return constant("BLOCK_EXTENT") * self.columns * STEP // (16 * 8 * 16) // (constant("THREADS") // 32)

    def copies(self, left: bool = True) -> int:
        """Copies of a thread in a step, of both operands or of the right one."""
        extents = (constant("BLOCK_EXTENT"), self.columns) if left else (self.columns,)
        return sum(ceil_div(extent * STEP * SIZE, VECTOR * constant("THREADS")) for extent in extents)

    @property
    def accumulators(self) -> int:
        """Of a thread."""
        return constant("BLOCK_EXTENT") * self.columns // constant("THREADS")

    def shared(self, size: int = SIZE) -> int:
        """Bytes of the stages in shared memory, of elements of a size; a vector that nothing uses follows each row."""
        step = STEP * SIZE // size
        pairs = ((constant("BLOCK_EXTENT"), self.left_along), (self.columns, self.right_along))
        tiles = ((extent, step) if along else (step, extent) for extent, along in pairs)
        return constant("STAGES") * sum(rows * (columns * size + VECTOR) for rows, columns in tiles)


def shrink_tile(columns: int) -> Tile:
    """Tokens times factors, both along their features."""
    return Tile(columns, True, True)


EXPAND = Tile(128, True, False)
HELD_STEPS = 3  # whose coefficients a block of expand_walk holds at most: HELD in csrc/cuda/expand.cu


def walk_shared(count: int, size: int = SIZE) -> int:
    """Bytes of a block that holds the coefficients of its tokens: them, and the stages of the factors."""
    step, rows = STEP * SIZE // size, constant("BLOCK_EXTENT")
    stages = constant("STAGES") * step * (EXPAND.columns * size + VECTOR)
    return stages + ceil_div(count, step) * rows * (step * size + VECTOR)


def wgrad_tile(columns: int) -> Tile:
    """Features times coefficients, both across their tokens."""
    return Tile(columns, False, False)


@dataclass(frozen=True)
class Machine:
    """The kernels of an architecture, and the steps that are read from them, each once."""

    arch: str
    builds: Mapping[Kernel, Built]
    _steps: dict[object, Step] = field(default_factory=dict, compare=False)

    def built(self, name: str, *sizes: int) -> Built:
        """A kernel of bf16."""
        kernel = Kernel(name, "bf16", sizes)
        if kernel not in self.builds:
            raise MachineCodeError(f"no {kernel} for {self.arch} in the cubins")
        return self.builds[kernel]

    def step(self, name: str, sizes: tuple[int, ...], tile: Tile) -> Step:
        """A step of the main loop."""
        return self._once(("step", name, sizes), lambda: self._main(name, sizes, tile), tile.products)

    def stores(self, name: str, sizes: tuple[int, ...], tile: Tile, widths: tuple[int, ...], size: int) -> Step:
        """What follows the main loop: the stores of all accumulators, a width at a time, `size` bytes for each."""
        stored = tile.accumulators * size
        return self._once(("stores", name, sizes), lambda: epilogue(self._main(name, sizes, tile), widths, stored))

    def addresses(self, name: str, sizes: tuple[int, ...], tile: Tile) -> Step:
        """What is added to a step of the main loop that makes its addresses anew: see CopiesOfTwo in copies.cuh."""
        whole = self._once(("longest", name, sizes), lambda: longest(self._main(name, sizes, tile)), tile.products)
        return _minus(whole, self.step(name, sizes, tile))

    def sweep(self, name: str, sizes: tuple[int, ...]) -> Step:
        """A step of the sweep over the columns of y or dx."""
        return self._once(("sweep", name, sizes), lambda: self._sweep(name, sizes), EXPAND.products)

    def sweep_addresses(self, name: str, sizes: tuple[int, ...]) -> Step:
        """What the addresses take when they are made anew: in steps that reach into a second buffer, and for each tile.

        The longest route makes them for both.
        """
        route = partial(self._sweep, name, sizes)
        whole = self._once(("longest sweep", name, sizes), lambda: longest(route()), EXPAND.products)
        return Step(*(figure / 2 for figure in _minus(whole, self.sweep(name, sizes))))

    def sweep_stores(self, name: str, sizes: tuple[int, ...]) -> Step:
        """What is added to the step after which a tile is stored."""
        route = partial(with_store, widths=PAIRS, stored=EXPAND.accumulators * SIZE)
        whole = self._once(("sweep with stores", name, sizes), lambda: route(self._sweep(name, sizes)))
        return _minus(whole, self.sweep(name, sizes))

    def _main(self, name: str, sizes: tuple[int, ...], tile: Tile) -> Route:
        return find_step(self.built(name, *sizes).listing, tile.products, tile.copies())

    def _sweep(self, name: str, sizes: tuple[int, ...]) -> Route:
        return find_step(self.built(name, *sizes).listing, EXPAND.products, EXPAND.copies(left=False))

    def _once(self, key: object, find: Callable[[], Route], products: int | None = None) -> Step:
        """The step of a route, which holds several if the compiler unrolled the loop."""
        if key not in self._steps:
            route = find()
            times = 1 if products is None else route.count(PRODUCT) // products
            self._steps[key] = step_of(route, HMMA[self.arch], times)
        return self._steps[key]


def device_of(chip: Chip) -> Device:
    """A chip as the plans know it."""
    return Device(chip.processors, SHARED_MEMORY[chip.arch] - 1024, cooperative=True)


@dataclass(frozen=True)
class Call:
    """A call on a chip: the kernels of its forward and of its backward."""

    chip: Chip
    machine: Machine
    shape: Shape

    def forward(self) -> tuple[str, list[Estimate]]:
        """The path, and the kernels, of a forward that saves what a backward needs."""
        T, I, O, E, R, experts_of_a = self.shape.sizes  # noqa: E741
        columns, processors = E * R + E, self.chip.processors
        plan = configs.decode_plan(T, I, O, E, experts_of_a, R, True, SIZE, device_of(self.chip))
        if plan is not None:
            return "decode", [self.decode(plan)]
        if smem := configs.one_pass_smem(T, E, R, columns, SIZE, processors):
            return "one pass", [self.one_pass(columns, smem)]
        parts = configs.shrink_parts(T, columns, I, SIZE, processors)
        kernels = [self.shrink("x", I, columns, parts), self.mix("mix_fwd", columns, parts, writes=2)]
        return "stages", [*kernels, self.expand("into y", O, E * R, 0)]

    def backward(self) -> tuple[str, list[Estimate]]:
        """The same of a backward that computes all gradients."""
        T, I, O, E, R, _ = self.shape.sizes  # noqa: E741
        parts = configs.shrink_parts(T, E * R, O, SIZE, self.chip.processors)
        kernels = [self.shrink("dy", O, E * R, parts), self.mix("mix_bwd", E * R, parts, writes=4)]
        kernels += [self.expand("into dx", I, E * R + E, E)]
        return "stages", [*kernels, *self.wgrad("x", I, E * R + E), *self.wgrad("dy", O, E * R)]

    def one_pass(self, count: int, smem: int) -> Estimate:
        """All of a forward: shrink, mix in shared memory, and the sweep over the columns of y."""
        T, I, O, E, R, _ = self.shape.sizes  # noqa: E741
        sizes = (configs.product_columns(count),)
        tiles = ceil_div(T, constant("BLOCK_EXTENT"))
        x, y, factors, b = T * I * SIZE, T * O * SIZE, count * I * SIZE, E * R * O * SIZE
        saved = T * (E * R * SIZE + E * 4)
        step = self.machine.step("forward", sizes, shrink_tile(*sizes))
        sweep = self._sweep("forward", sizes, ceil_div(O, EXPAND.columns), E * R, 0)
        mixed = mix.of_a_block(constant("BLOCK_EXTENT"), E, R, constant("THREADS"))
        phases = [
            Phase("shrink", [Work(ceil_div(I, STEP), step, constant("STAGES") - 1)], x + factors, x + tiles * factors),
            Phase("mix", (), saved, saved, mixed / self.chip.clock),
            Phase("sweep", sweep, y + b, y + tiles * b),
        ]
        floor = self._floor(x + y, 2 * T * (count * I + E * R * O))
        return self._estimate("forward", sizes, phases, tiles, smem, floor, "x to y")

    def decode(self, plan: configs.DecodePlan) -> Estimate:
        """All of a forward of few tokens, in one cooperative launch."""
        shape, chip = self.shape, self.chip
        phases, floor = phases_of_decode(chip, shape, plan), floor_seconds(chip, shape, "forward")
        threads, detail = 32 * configs.DECODE_WARPS, f"{plan.chunks} chunks"
        return self._estimate("decode_fwd", (), phases, plan.blocks, plan.smem, floor, detail, threads)

    def shrink(self, of: str, features: int, count: int, parts: int) -> Estimate:
        """Partial sums of rows with `count` factors."""
        T, columns = self.shape.tokens, configs.product_columns(count)
        tile, passes, tiles = shrink_tile(columns), ceil_div(count, columns), ceil_div(T, constant("BLOCK_EXTENT"))
        steps, partial_sums = ceil_div(ceil_div(features, parts), STEP), parts * T * count * 4
        rows, factors = T * features * SIZE, count * features * SIZE
        works = [
            Work(steps, self.machine.step("shrink", (columns,), tile), constant("STAGES") - 1),
            Work(1, self.machine.stores("shrink", (columns,), tile, (8, 4), 4)),
        ]
        memory = rows * (passes if rows > self.chip.kept else 1) + factors + self._if_not_kept(partial_sums)
        phase = Phase("shrink", works, memory, passes * rows + tiles * factors + partial_sums)
        floor = self._floor(rows, 2 * T * features * count)
        return self._estimate(
            "shrink", (columns,), [phase], tiles * parts * passes, tile.shared(), floor, f"of {of}, {parts} parts"
        )

    def mix(self, name: str, columns: int, parts: int, writes: int) -> Estimate:
        """The sums of all parts, softmax and mix; it writes so many matrices of E R columns."""
        T, _, _, E, R, _ = self.shape.sizes
        backward = name == "mix_bwd"
        launch = mix.Launch.of(columns, E, R, backward, SIZE)
        sizes, threads = (mix.WIDTH, int(launch.shared > 0)), 32 * launch.warps
        blocks, partial_sums, written = ceil_div(T, launch.tokens), parts * T * columns * 4, writes * T * E * R * SIZE
        waves = ceil_div(blocks, self._resident(name, sizes, launch.shared, threads) * self.chip.processors)
        cycles = waves * launch.cycles(columns, E, R, parts, backward)
        memory = self._if_not_kept(partial_sums) + self._if_not_kept(written)
        phase = Phase("mix", (), memory, partial_sums + written, cycles / self.chip.clock)
        floor, detail = written / self.chip.memory, f"{parts} parts"
        return self._estimate(name, sizes, [phase], blocks, launch.shared, floor, detail, threads)

    def expand(self, into: str, features: int, count: int, in_second: int) -> Estimate:
        """Coefficients times factors, stored. Of dx, the last factors lie in a second buffer: the gate's, behind A."""
        T, extent = self.shape.tokens, constant("BLOCK_EXTENT")
        token_tiles, tiles = ceil_div(T, extent), ceil_div(features, EXPAND.columns)
        walks = count <= HELD_STEPS * STEP
        if walks:
            groups = configs.expand_groups(T, features, self.chip.processors)
            blocks, shared, detail = token_tiles * groups, walk_shared(count), f"{into}, {groups} groups"
            works = self._sweep("expand_walk", (), ceil_div(tiles, groups), count, in_second)
            loaded = token_tiles * (groups * extent + features) * count * SIZE
        else:
            blocks, shared, detail = token_tiles * tiles, EXPAND.shared(), into
            step, addresses = (make("expand", (), EXPAND) for make in (self.machine.step, self.machine.addresses))
            works = _steps(count, in_second, 1, step, addresses)
            works.append(Work(1, self.machine.stores("expand", (), EXPAND, PAIRS, SIZE)))
            loaded = blocks * (extent + EXPAND.columns) * count * SIZE
        written, coefficients, factors = T * features * SIZE, T * count * SIZE, count * features * SIZE
        phase = Phase("expand", works, written + factors + self._if_not_kept(coefficients), loaded + written)
        floor, name = self._floor(written, 2 * T * features * count), "expand_walk" if walks else "expand"
        return self._estimate(name, (), [phase], blocks, shared, floor, detail)

    def _sweep(self, name: str, sizes: tuple[int, ...], tiles: int, count: int, in_second: int) -> list[Work]:
        """Coefficients in shared memory times so many tiles of factors; the first step waits for its copies, too."""
        step, addresses, stores = (
            make(name, sizes) for make in (self.machine.sweep, self.machine.sweep_addresses, self.machine.sweep_stores)
        )
        first = Work(1, step, constant("STAGES") - 1)
        return [first, *_steps(count, in_second, tiles, step, addresses), Work(tiles, plus(addresses, stores))]

    def wgrad(self, over: str, features: int, count: int) -> list[Estimate]:
        """Coefficients times rows, summed over the tokens, and the sum of the splits' partial sums."""
        T, columns = self.shape.tokens, configs.product_columns(count)
        tile, passes = wgrad_tile(columns), ceil_div(count, columns)
        wanted = configs.wgrad_splits(T, count, features, SIZE, self.chip.processors)
        tokens = ceil_div(ceil_div(T, wanted), STEP) * STEP
        splits = ceil_div(T, tokens)
        blocks = ceil_div(features, constant("BLOCK_EXTENT")) * passes * splits
        rows, coefficients = T * features * SIZE, self._if_not_kept(T * count * SIZE)
        stored = splits * count * features * 4 if splits > 1 else count * features * SIZE
        works = [
            Work(ceil_div(tokens, STEP), self.machine.step("wgrad_bwd", (columns,), tile), constant("STAGES") - 1),
            Work(1, self.machine.stores("wgrad_bwd", (columns,), tile, (8, 4), 4)),  # of partial sums, or of gradients
        ]
        memory = rows * (passes if rows > self.chip.kept else 1) + coefficients
        memory += stored if splits == 1 else self._if_not_kept(stored)
        loaded = blocks * (constant("BLOCK_EXTENT") + columns) * tokens * SIZE
        floor, detail = self._floor(rows, 2 * T * features * count), f"over {over}, {splits} splits"
        phases = [Phase("wgrad", works, memory, loaded + stored)]
        found = [self._estimate("wgrad_bwd", (columns,), phases, blocks, tile.shared(), floor, detail)]
        if splits > 1:
            written = count * features * SIZE
            phase = Phase("sum", (), written + self._if_not_kept(stored), stored + written)
            blocks = count * ceil_div(features, constant("THREADS"))
            found.append(self._estimate("wgrad_sum_bwd", (), [phase], blocks, 0, written / self.chip.memory, f"over {over}"))
        return found

    def _estimate(
        self, name: str, sizes: tuple[int, ...], phases: list[Phase], blocks: int, shared: int, floor: float, detail: str,
        threads: int | None = None,
    ) -> Estimate:  # fmt: skip
        threads = threads or constant("THREADS")
        return estimate(
            self.chip, f"{name}{list(sizes) if sizes else ''}", phases, blocks=blocks, threads=threads,
            resident=self._resident(name, sizes, shared, threads), registers=self.machine.built(name, *sizes).registers,
            shared=shared, floor=floor, detail=detail,
        )  # fmt: skip

    def _resident(self, name: str, sizes: tuple[int, ...], shared: int, threads: int) -> int:
        """Blocks that fit a processor at once."""
        built = self.machine.built(name, *sizes)
        found = resident_blocks(built.registers, threads, shared + built.shared, self.chip.arch)
        if found == 0:
            needs = f"{built.registers} registers a thread, {shared + built.shared} bytes of shared memory"
            raise MachineCodeError(f"{built.kernel} does not fit a processor of {self.chip.arch}: {needs}")
        return found

    def _floor(self, moved: float, flops: float) -> float:
        return max(moved / self.chip.memory, flops / self.chip.gemm)

    def _if_not_kept(self, stored: int) -> int:
        """Bytes that pass through memory because they do not stay in the L2."""
        return stored if stored > self.chip.kept else 0


def plus(one: Step, other: Step) -> Step:
    """What a warp does in both."""
    return Step(*(a + b for a, b in zip(one, other, strict=True)))


def _minus(one: Step, other: Step) -> Step:
    return Step(*(a - b for a, b in zip(one, other, strict=True)))


def _steps(count: int, in_second: int, tiles: int, step: Step, addresses: Step) -> list[Work]:
    """The steps of so many sums over `count` factors; those that reach into a second buffer make their addresses anew."""
    plain = (count - in_second) // STEP if in_second else _of_steps(count)
    anew = _of_steps(count) - plain
    in_flight = constant("STAGES") - 1
    return [Work(tiles * plain, step, in_flight), Work(tiles * anew, plus(step, addresses), in_flight)]


def _of_steps(count: int) -> float:
    """Steps of a sum over `count` columns: the last one multiplies whole halves only."""
    return ceil_div(count, STEP // 2) / 2
