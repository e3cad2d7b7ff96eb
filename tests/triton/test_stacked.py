"""The Triton kernels for several mixtures: how many launches, what they read, no races, offsets past 2^31, their tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs, host, serving, stacked_configs
from lmoe_kernels.backends.triton.plans import Chip, StackedPlan
from lmoe_kernels.options import Block, Sizes, TokenGroups
from tests import plans
from tests.serving import ADAPTERS, MIXED, ONE, QKV, Call, make_call, of_adapters
from tests.triton.chips import CHIPS, H200
from tests.triton.far import BEFORE, behind_many_others, start_the_last_tiles_alone
from tools.error_rule import assert_no_worse
from tools.interpreter.bytes import Access, Bytes, counted, of_tensor
from tools.interpreter.races import race_checked

BF16 = torch.bfloat16


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all kernels that are launched, in order."""
    names: list[str] = []

    def launch(kernel: Any, *args: Any, launch: Any = host.launch, **constants: object) -> None:
        names.append(kernel.fn.__name__.removeprefix("_stacked_").removesuffix("_fwd_kernel"))
        launch(kernel, *args, **constants)

    monkeypatch.setattr(host, "launch", launch)
    return names


def _by_argument(counts: dict[Access, Bytes]) -> tuple[Counter[str], Counter[str]]:
    """The bytes that all kernels together load and store, under the names of their arguments."""
    loaded, stored = Counter(), Counter()
    for access, count in counts.items():
        loaded[access.argument] += count.loaded
        stored[access.argument] += count.stored
    return loaded, stored


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize(
    "blocks, groups, kinds",
    [
        (ONE, "", 1),
        (QKV, "", 1),
        (of_adapters(QKV, 3), "int", 1),
        (of_adapters(QKV, 2), "", 2),  # they add to the same elements of y
        (ADAPTERS, "int", 3),
        (MIXED, "", 4),
        ([block._replace(scaling=index + 0.5) for index, block in enumerate(QKV)], "", 1),
    ],
    ids=["one", "qkv", "adapters in groups", "adapters that overlap", "three kinds", "four kinds", "scalings"],
)
def test_one_shrink_and_a_mix_and_an_expand_for_each_kind(
    blocks: Sequence[Block], groups: str, kinds: int, tokens: int, launched: list[str]
) -> None:
    call = make_call(blocks, BF16, tokens, features=32, groups=groups)
    for _ in range(2):
        launched.clear()
        y = call.run("triton")
        assert launched == ["shrink", *kinds * ["mix", "expand"]]
        assert_no_worse("y", y, call.plain(), call.true())


def test_the_launches_are_on_the_device_of_x(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    on_device_of = host.on_device_of
    monkeypatch.setattr(host, "on_device_of", lambda rows: entered.append((rows, list(launched))) or on_device_of(rows))
    call = make_call(QKV, BF16)
    call.run("triton")
    assert [(rows is call.x, names) for rows, names in entered] == [(True, [])]


@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize("groups, tokens", [("", 35), ("int", 35), ("", 70)])
def test_no_result_depends_on_scheduling(groups: str, tokens: int, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many splits there are."""
    plans.set_chip(Chip("interpreter", processors, 1 << 16), monkeypatch)
    call = make_call(ADAPTERS, BF16, tokens, features=272, groups=groups)
    with race_checked():
        y = call.run("triton")
    assert_no_worse("y", y, call.plain(), call.true())


def test_x_is_read_once_for_each_tile_of_rows_and_y_is_read_and_written_once() -> None:
    call = make_call([Block(4, 8, 48), Block(4, 8, 16, column=48)], BF16, tokens=50, features=40)
    y = call.y.clone()
    with counted() as counts:
        call.add(y, "triton")
    assert of_tensor(counts, call.x).loaded == 2 * call.x.nbytes, "64 rows of A, and those of the gates"
    assert _by_argument(counts)[0]["a"] == 2 * call.experts.lora_a.numel() * 2, "by two tiles of tokens"
    assert (of_tensor(counts, y).loaded, of_tensor(counts, y).stored) == (y.nbytes, y.nbytes)


@pytest.mark.parametrize("modules", [1, 2])
def test_with_many_tokens_the_gates_need_no_reads_of_x(modules: int) -> None:
    """Each module has 64 rows of A, one tile. Every program reads all gates, and those of the first tile store the sums."""
    blocks = [Block(8, 8, 16, column=16 * module) for module in range(modules)]
    call = make_call(blocks, BF16, tokens=70, features=48)
    gates = 8 * modules
    with counted() as counts:
        call.add(call.y.clone(), "triton")
    loaded, stored = _by_argument(counts)
    assert loaded["x"] == modules * call.x.nbytes
    assert loaded["a"] == 3 * modules * 64 * 48 * 2, "by three tiles of tokens"
    assert loaded["gate"] == 3 * modules * gates * 48 * 2
    assert stored["parts"] == 70 * (64 * modules + gates) * 4


@pytest.mark.parametrize(
    "tokens, features, experts, with_a",
    [(65, 4096, 8, True), (64, 4096, 8, False), (65, 4096, 32, True), (65, 4096, 33, False), (65, 4104, 8, False)],
    ids=["many tokens", "few tokens", "most gates", "more gates", "x is not aligned"],
)
@pytest.mark.parametrize("groups", [False, True])
def test_which_gates_come_with_a(
    tokens: int, features: int, experts: int, with_a: bool, groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    plan = stacked_configs.stacked_plan
    monkeypatch.setattr(serving, "stacked_plan", lambda *sizes: chosen.append(plan(*sizes)) or chosen[-1])
    call = make_call([Block(experts, 1, 1)], BF16, tokens, features, groups="int" if groups else "")
    y = call.run("triton")
    assert [one.gate_with_a for one in chosen] == [with_a and not groups]
    assert_no_worse("y", y, call.plain(), call.true())


@pytest.mark.parametrize("tokens", [128, 512, 2048, 8192])
def test_gates_that_come_with_a_have_the_tiles_that_were_timed_in_a_forward(tokens: int) -> None:
    sizes = Sizes(tokens, 4096, 4096, 8, 16, 8)
    forward = configs.forward_plan(sizes, BF16, H200)
    plan = stacked_configs.stacked_plan(tokens, 4096, 8 * 17, 8, (sizes,), BF16, H200)
    assert (plan.splits, replace(plan.shrink, R=16)) == (forward.splits, forward.shrink)


def test_groups_that_do_not_occur_cost_nothing() -> None:
    """Each adapter has 64 rows of A, one tile; the gates of the four adapters share a tile."""
    call = make_call(of_adapters([Block(4, 8, 48), Block(4, 8, 16, column=48)], 4), BF16, 35, features=40, groups="int")
    assert call.groups is not None
    call.groups.group.fill_(2)
    call.groups.group[32:] = -1  # all tokens of the second tile
    y, tensors = call.y.clone(), call.experts
    with counted() as counts:
        call.add(y, "triton")
    loaded, stored = _by_argument(counts)
    assert loaded["a"] == tensors.lora_a.numel() * 2 / 4
    assert loaded["b"] == tensors.lora_b.numel() * 2 / 4
    assert loaded["gate"] == tensors.gate_weight.numel() * 2, "the tile of all gates, once"
    assert loaded["y"] == stored["y"] == 32 * y.shape[1] * 2
    assert stored["v"] == 32 * 2 * 4 * 8 * 2, "of two blocks"
    assert loaded["x"] == 2 * 32 * 40 * 2, "by the tile of A, and by that of the gates"
    assert stored["parts"] == 32 * (64 + tensors.gate_weight.shape[0]) * 4


@pytest.mark.parametrize("groups, tokens", [("with scale", 20), ("", 70)])
def test_the_last_tokens_of_many(groups: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor with a row for each token has elements behind 2^31: x, y, the partial sums, v, groups and scales."""
    call = make_call(of_adapters(QKV, 2), BF16, tokens, features=272, groups=groups)
    of_few: list[StackedPlan] = []
    plan = stacked_configs.stacked_plan

    def planned(tokens: int, *rest: Any) -> StackedPlan:
        of_few.append(of_few[0] if of_few else plan(tokens, *rest))
        return of_few[0]

    monkeypatch.setattr(serving, "stacked_plan", planned)
    plans.set_chip(Chip("interpreter", 64, 1 << 16), monkeypatch)
    expected = call.run("triton")
    assert of_few[0].splits > 1
    start_the_last_tiles_alone(call.x.shape[0], monkeypatch)
    far = call.groups and TokenGroups(*(behind_many_others(rows) for rows in call.groups if rows is not None))
    y = behind_many_others(call.y)
    with counted():  # which refuses what lies outside of a kernel's arguments
        Call(y, behind_many_others(call.x), call.experts, None, far).add(y, "triton")
    assert torch.equal(y[BEFORE:], expected)


def test_a_first_call_within_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables come from the host, which a graph cannot wait for."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    blocks = tuple(block._replace(scaling=float(torch.rand(()))) for block in QKV)  # of no other test
    with pytest.raises(RuntimeError, match="called once before a CUDA graph captures a call"):
        serving._stack_of(blocks, False, torch.device("cuda", 0), torch.float32)


@pytest.mark.parametrize(
    "numbers, alignment", [((64, 0, 128), 16), ((64, 0, 17), 1), ((64, 8, 48), 8), ((24, 0, 16), 8), ((17, 0, 64), 1)]
)
def test_kernels_are_given_an_alignment_that_every_block_has(numbers: tuple[int, int, int], alignment: int) -> None:
    """The interpreter ignores the hints that a GPU relies on: blocks begin at multiples of it in B and in y."""
    first, column, second = numbers
    blocks = (Block(3, 1, first, column=column), Block(3, 1, second, column=column + first))
    (table,) = serving._stack_of(blocks, False, torch.device("cpu"), torch.float32).tables
    assert table.alignment == alignment
    assert not (table.places[:, 3:] % alignment).any()


def test_the_blocks_of_a_launch_add_to_different_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every block is in one launch."""
    for _ in range(30):
        blocks = tuple(Block(2, 2, *torch.randint(1, 9, (2,)).tolist(), group=int(torch.randint(3, ()))) for _ in range(12))
        for in_groups in (False, True):
            found = 0
            for table in serving._stack_of(blocks, in_groups, torch.device("cpu"), torch.float32).tables:
                found += len(table.places)
                elements = [
                    {(group if in_groups else 0, column + i) for i in range(width)}
                    for group, *_, column, width in table.places.tolist()
                ]
                assert not any(one & other for one, other in combinations(elements, 2))
            assert found == len(blocks)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.arch)
def test_every_plan_fits_its_chip(chip: Chip, dtype: torch.dtype) -> None:
    for tokens, in_groups in product((1, 64, 512, 8192), (False, True)):
        for experts, rank in ((1, 1), (8, 16), (16, 64), (256, 4)):
            kind = Sizes(0, 0, 6144, experts, rank, experts)
            rows, gates = 3 * experts * (rank + 1), 0 if in_groups else 3 * experts
            plan = stacked_configs.stacked_plan(tokens, 4096, rows, gates, (kind,), dtype, chip)
            (tiles,) = plan.tiles
            assert experts <= tiles.mix.E
            assert tiles.mix.T * tiles.mix.E * tiles.mix.R <= 4096
            stages = plan.shrink.stages - chip.arch.startswith("gfx")
            loaded = plan.shrink.T + plan.shrink.ER + (plan.shrink.E if plan.gate_with_a else 0)
            assert stages * loaded * plan.shrink.F * dtype.itemsize <= chip.shared_memory
            assert gates <= plan.shrink.E or not plan.gate_with_a
            programs = plan.shrink.tiles_of(tokens) * -(-rows // plan.shrink.ER) * plan.splits
            assert programs > chip.processors / 4 or rows < 128 or tokens < 512, f"{tokens} {kind}: {plan}"


def test_all_blocks_together_may_have_more_experts_than_one_mixture() -> None:
    call = make_call(of_adapters([Block(100, 1, 8)], 3), torch.float64, tokens=5, groups="int")
    assert_no_worse("y", call.run("triton"), call.plain(), call.true())
