"""Stacked mixtures in the cuda backend: their plans, launches and groups, and what the bindings refuse."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import configs, extension, serving
from lmoe_kernels.options import Block, TokenGroups, places_of
from lmoe_kernels.serving import StackedExperts, lmoe_stacked_
from tests.serving import ADAPTERS, MIXED, ONE, QKV, make_call
from tests.tensors import off_by_a_byte, off_by_an_element
from tools.emulator.launches import capture, devices, recorded
from tools.error_rule import assert_no_worse

H100 = extension.Device(132, 227 << 10, cooperative=True)
FUSED = (Block(8, 16, 4096), Block(8, 16, 1024, column=4096), Block(8, 16, 1024, column=5120))
TWO_ADAPTERS = (*FUSED, *(block._replace(group=1, rank=8) for block in FUSED))


@pytest.fixture(autouse=True)
def _watched(watch) -> None:
    """Every test watches its allocations."""


def test_a_tile_has_columns_of_one_module() -> None:
    plan = configs.stacked_plan(1, 4096, FUSED, True, 2, H100)
    assert plan is not None
    assert [tuple(some) for some in plan.columns] == [(0, 4096, 1), (4096, 1024, 2), (5120, 1024, 4)]
    assert sum(some.tiles(plan.decode.column_tile) for some in plan.columns) == 130
    assert plan.decode[:4] == (130, 2048, 2, 48)


def test_adapters_share_the_tiles_of_a_module() -> None:
    plan = configs.stacked_plan(4, 4096, TWO_ADAPTERS, True, 2, H100)
    assert plan is not None
    assert [some.blocks for some in plan.columns] == [1 | 8, 2 | 16, 4 | 32]
    assert plan.decode.chunks == 1, "632 rows, of which no two warps of the 1056 can share each"


@pytest.mark.parametrize("widths", [(100,), (11008, 11008), (4, 4096, 124), tuple([40] * 20)], ids=str)
def test_no_processor_has_two_tiles_if_one_is_enough(widths: tuple[int, ...]) -> None:
    blocks, column = [], 0
    for width in widths:
        blocks.append(Block(4, 8, width, column=column))
        column += width + 3
    plan = configs.stacked_plan(2, 512, tuple(blocks), True, 2, H100)
    assert plan is not None
    tiles = [some.tiles(plan.decode.column_tile) for some in plan.columns]
    assert sum(tiles) <= 132
    assert [some.width for some in plan.columns] == list(widths), "the gaps belong to no block"
    assert all(plan.decode.column_tile * count >= width for count, width in zip(tiles, widths, strict=True))


def test_calls_that_one_launch_cannot_take_have_no_plan() -> None:
    sizes = (4096, FUSED, True, 2)
    assert configs.stacked_plan(17, *sizes, H100) is None
    assert configs.stacked_plan(16, *sizes, H100._replace(cooperative=False)) is None
    assert configs.stacked_plan(16, 64, (Block(64, 64, 64),), True, 2, H100) is None, "too much shared memory"


@pytest.mark.parametrize("groups", ["", "int with scale"])
@pytest.mark.parametrize("tokens", [16, 17])
def test_few_tokens_take_one_launch_for_all_blocks(tokens: int, groups: str, emulated_cuda) -> None:
    """More tokens take several, and both add what the definition adds."""
    call = make_call(ADAPTERS, torch.bfloat16, tokens=tokens, groups=groups)
    with recorded(emulated_cuda) as calls:
        y = call.run("cuda")
    if tokens == 16:
        assert [launch.kernel for launch in calls.launches] == ["cooperative"]
    else:
        assert "cooperative" not in calls.kernels
    assert_no_worse("y", y, call.plain(), call.true())


@pytest.mark.parametrize("outside", [False, True], ids=["gates", "logits"])
def test_more_blocks_than_a_launch_takes(outside: bool, emulated_cuda) -> None:
    blocks = [
        Block(1 + i % 3, 1 + i % 2, 5, column=5 * (i // 2), group=i % 3) for i in range(2 * configs.STACKED_BLOCKS + 1)
    ]
    call = make_call(blocks, torch.float32, tokens=4, groups="int", outside=outside)
    with recorded(emulated_cuda) as calls:
        y = call.run("cuda")
    assert [launch.kernel for launch in calls.launches] == ["cooperative"] * 3
    assert_no_worse("y", y, call.plain(), call.true())


@pytest.mark.parametrize("groups", ["", "int", "int with scale"])
@pytest.mark.parametrize("outside", [False, True], ids=["gates", "logits"])
def test_block_by_block_on_a_device_without_cooperative_launches(outside: bool, groups: str, emulated_cuda) -> None:
    call = make_call(MIXED, torch.bfloat16, groups=groups, outside=outside)
    with devices(emulated_cuda, cooperative=False), recorded(emulated_cuda) as calls:
        y = call.run("cuda")
    assert "cooperative" not in calls.kernels
    assert_no_worse("y", y, call.plain(), call.true())


def _numbers_that_are_not_finite(experts: StackedExperts, group: int) -> None:
    for index, block in enumerate(experts.blocks):
        if block.group == group:
            for name, value in (("lora_a", "nan"), ("lora_b", "inf"), ("gate_weight", "nan"), ("gate_bias", "inf")):
                experts.part(index, name).fill_(float(value))


@pytest.mark.parametrize("tokens", [1, 3, 16, 20])
def test_an_adapter_that_is_not_finite_reaches_its_own_tokens_alone(tokens: int, emulated_cuda) -> None:
    call = make_call(ADAPTERS, torch.float16, tokens=tokens)
    group = torch.tensor([0, 1, 7, -1])[torch.randint(4, (tokens,))]
    group[0] = 0
    group[-1] = group[-1] if tokens == 1 else 1
    call = call._replace(groups=TokenGroups(group, torch.rand(tokens)))
    before = call.run("cuda")
    _numbers_that_are_not_finite(call.experts, 1)
    after = call.run("cuda")
    assert torch.equal(after[group != 1], before[group != 1])
    assert not after[group == 1][:, : ADAPTERS[0].out_features].isfinite().any()
    assert torch.equal(after[group == -1], call.y[group == -1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_mixture_that_no_token_has_is_not_read(dtype: torch.dtype, emulated_cuda, watch) -> None:
    """The totals of its rows stay as they were allocated; without any mixture nothing is computed."""
    call = make_call(ADAPTERS, torch.float32, tokens=3)
    group = torch.tensor([7, -1, 7], dtype=dtype)
    call._replace(groups=TokenGroups(group, None)).run("cuda")
    totals = _last_totals(watch, 3)
    places, rows = places_of(tuple(ADAPTERS)), call.experts.lora_a.shape[0]
    for block, place in zip(ADAPTERS, places, strict=True):
        own = torch.cat([totals[:, place.a], totals[:, rows:][:, place.experts]], dim=1)
        assert own.isnan().all() == (block.group != 7)
    y = call._replace(groups=TokenGroups(torch.full_like(group, 2), None)).run("cuda")
    assert torch.equal(y, call.y)
    assert _last_totals(watch, 3).isnan().all()


def _last_totals(watch, tokens: int) -> Tensor:
    buffer, count = next(pair for pair in reversed(watch.buffers) if pair[0].dtype == torch.float32)
    return buffer[128 : 128 + count].view(tokens, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["fp32", "dtype of x"])
def test_rows_off_16_bytes_and_gates_of_either_dtype(gate: str, dtype: torch.dtype, emulated_cuda) -> None:
    for features in (23, 24):
        call = make_call(MIXED, dtype, tokens=5, features=features)
        if gate == "dtype of x":
            call.experts.gate_weight = torch.nn.Parameter(call.experts.gate_weight.to(dtype), requires_grad=False)
        call = call._replace(x=off_by_an_element(call.x))
        for name in ("lora_a", "lora_b"):
            moved = off_by_an_element(getattr(call.experts, name).detach())
            setattr(call.experts, name, torch.nn.Parameter(moved, requires_grad=False))
        assert_no_worse("y", call.run("cuda"), call.plain(), call.true())


@pytest.mark.parametrize("tokens", [2, 9])
def test_many_features_in_chunks(tokens: int, emulated_cuda, monkeypatch) -> None:
    """The warps of a block share the features of a row, the last chunk incomplete; a block has several tiles."""
    plan = configs.stacked_plan

    def of_chunks(*sizes) -> configs.StackedPlan:
        made = plan(*sizes)
        return made._replace(decode=made.decode._replace(blocks=2, chunk=512, chunks=4))

    monkeypatch.setattr(serving, "stacked_plan", of_chunks)
    call = make_call(QKV, torch.bfloat16, tokens=tokens, features=1992)
    assert_no_worse("y", call.run("cuda"), call.plain(), call.true())


def test_the_first_call_may_be_within_a_capture(unused_cuda) -> None:
    with capture(unused_cuda):
        make_call(QKV, torch.bfloat16, groups="int").run("cuda")


def test_the_launch_goes_to_the_tensors_device_and_the_callers_stream(emulated_cuda, monkeypatch) -> None:
    monkeypatch.setattr(extension, "queue", lambda tensor: (1, 0x5EED0))
    with recorded(emulated_cuda) as calls:
        make_call(QKV, torch.bfloat16).run("cuda")
    assert [(launch.device, launch.stream) for launch in calls.launches] == [(1, 0x5EED0)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"smem": 4096}, "count shared memory"), ({"chunk": 8}, "share out the work"), ({"chunks": 3}, "share out the work")],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_refused(wrong: dict[str, int], message: str, emulated_cuda, monkeypatch) -> None:
    plan = configs.stacked_plan
    monkeypatch.setattr(
        serving, "stacked_plan", lambda *sizes: plan(*sizes)._replace(decode=plan(*sizes).decode._replace(**wrong))
    )
    with recorded(emulated_cuda) as calls, pytest.raises(RuntimeError, match=f"stacked_kernel: .* {message} differently"):
        make_call(ONE, torch.bfloat16).run("cuda")
    assert calls.launches == []


def test_tables_that_the_bindings_do_not_know_are_refused(emulated_cuda: ModuleType) -> None:
    """A field that only options.py has, or only csrc/bindings.cpp, must not shift the others."""
    plan = configs.stacked_plan(1, 8, tuple(ONE), True, 2, extension.device_of(0))
    assert plan is not None
    make = emulated_cuda.StackedParams
    make(1, 1, 8, tuple(ONE), *plan)
    with pytest.raises(TypeError, match="lmoe: Block must have 10 fields, got 11"):
        make(1, 1, 8, ((*ONE[0], 1),), *plan)
    with pytest.raises(TypeError, match="lmoe: Columns must have 3 fields, got 2"):
        make(1, 1, 8, tuple(ONE), ((0, 1),), plan.decode)
    with pytest.raises(TypeError, match="lmoe: DecodePlan must have 5 fields, got 4"):
        make(1, 1, 8, tuple(ONE), plan.columns, plan.decode[:4])
    with pytest.raises(ValueError, match="lmoe: mixing must be one of factors, outputs, got 'mean'"):
        make(1, 1, 8, (ONE[0]._replace(mixing="mean"),), *plan)
    with pytest.raises(ValueError, match="lmoe: blocks must be at most 32, got 33"):
        make(1, 1, 8, tuple(ONE) * (configs.STACKED_BLOCKS + 1), *plan)
    with pytest.raises(ValueError, match="lmoe: columns must be at most 63, got 64"):
        make(1, 1, 8, tuple(ONE), plan.columns * (2 * configs.STACKED_BLOCKS), plan.decode)


@pytest.mark.parametrize("name", ["y", "x", "lora_a", "lora_b", "gate_weight", "gate_bias", "token_group", "token_scale"])
def test_an_address_between_two_elements_is_refused(name: str, emulated_cuda) -> None:
    """The error names the tensor, and no kernel runs."""
    call = make_call(ONE, torch.float32, groups="int with scale")
    assert call.groups is not None
    t = {"y": call.y, "x": call.x, "token_group": call.groups.group, "token_scale": call.groups.scale}
    if name in t:
        t[name] = off_by_a_byte(t[name])
    else:
        moved = off_by_a_byte(getattr(call.experts, name).detach())
        setattr(call.experts, name, torch.nn.Parameter(moved, requires_grad=False))
    with recorded(emulated_cuda) as calls, pytest.raises(ValueError, match=f"lmoe: {name} must lie on a multiple of"):
        lmoe_stacked_(
            t["y"], t["x"], call.experts, token_group=t["token_group"], token_scale=t["token_scale"], backend="cuda"
        )
    assert calls.launches == []
