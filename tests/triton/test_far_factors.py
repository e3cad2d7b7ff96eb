"""Triton kernels on factors and weight gradients past 2^31 elements, as 32-bit offsets cannot reach them.

A factor's rows are 2^30 features long, of which a program takes a few: kernels are started on the first tiles of features,
or, where a gradient is added up from its splits, on the last. Of the memory only the pages that are touched are ever there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.expand import expand_fwd, grouped_expand_fwd
from lmoe_kernels.backends.triton.plans import Chip, Tile, WgradPlan
from lmoe_kernels.backends.triton.shrink import grouped_shrink_fwd, shrink_fwd
from lmoe_kernels.backends.triton.wgrad import grouped_wgrad_bwd, wgrad_bwd
from tools.far import untouched
from tools.interpreter.bytes import counted

F = 2**30 + 64  # features: from the third row on elements lie past 2^31
NEAR = 64  # features that are looked at
T, E, R = 20, 3, 2
TILE = Tile(T=16, F=64, ER=16, E=16, R=2)
ALL_TOKENS = Tile(T=32, F=64, ER=16, E=16, R=2)
CHIP = Chip("interpreter", 1, 1 << 16)


@pytest.fixture(autouse=True)
def _unwritten_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_empty(self: Tensor, *size, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        return untouched(torch.Size(size if isinstance(size[0], int) else size[0]), dtype or self.dtype)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: untouched(tuple(like.shape), like.dtype))


@pytest.fixture(autouse=True)
def _no_wrong_address() -> Iterator[None]:
    with counted():  # which refuses what lies outside of a kernel's arguments
        yield


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """start(programs): a launch has the grid, and the first program in it, that programs(kernel's name, grid) gives."""

    def start(programs: Callable[[str, tuple[int, ...]], tuple[tuple[int, ...], int]]) -> None:
        launch = host.launch

        def few(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile, **constants: Any) -> None:
            grid, first = programs(kernel.fn.__name__, grid)
            with _programs_from(first):
                launch(kernel, grid, *args, tile=tile, **constants)

        monkeypatch.setattr(host, "launch", few)

    return start


@contextmanager
def _programs_from(first: int) -> Iterator[None]:
    """Programs count from `first` along the grid's first axis."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    program_id = builder.create_get_program_id

    def shifted(self: Any, axis: int) -> Any:
        program = program_id(self, axis)
        program.data += first if axis == 0 else 0
        return program

    with pytest.MonkeyPatch.context() as context:
        context.setattr(builder, "create_get_program_id", shifted)
        yield


def _factor(*shape: int) -> Tensor:
    """Rows of which the near features are random and the others zero."""
    factor = untouched((*shape, F), torch.float32)
    factor[..., :NEAR] = torch.randn(*shape, NEAR)
    return factor


def _same(ours: Tensor, true: Tensor) -> None:
    torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def test_expand(start: Callable) -> None:
    """The first program has all tokens and the first features."""
    start(lambda kernel, grid: ((1,), 0))
    v, factor, out = torch.randn(T, E, R), _factor(E, R), untouched((T, F), torch.float32)
    dlogits, gate = torch.randn(T, 5), _factor(5)
    expand_fwd(v, factor, out, ALL_TOKENS, dlogits=dlogits, gate_weight=gate, scaling=0.5)
    near = factor[..., :NEAR].reshape(E * R, NEAR).double()
    _same(out[:, :NEAR], 0.5 * (v.view(T, E * R).double() @ near + dlogits.double() @ gate[:, :NEAR].double()))


def test_shrink(start: Callable) -> None:
    """The features are cut into so many parts that the first is the near ones."""
    start(lambda kernel, grid: ((*grid[:2], 1), 0))
    rows, factor, gate = _factor(T), _factor(E, R), _factor(5)
    parts, gate_parts = shrink_fwd(rows, factor, gate, F // NEAR, TILE)
    near = rows[:, :NEAR].double()
    _same(parts[0], near @ factor[..., :NEAR].reshape(E * R, NEAR).t().double())
    _same(gate_parts[0], near @ gate[:, :NEAR].t().double())


def test_weight_gradients(start: Callable) -> None:
    start(lambda kernel, grid: ((1, *grid[1:]), 0))
    rows, pairs = _factor(T), [(torch.randn(T, E, R), untouched((E, R, F), torch.float32)), (torch.randn(T, 5), _factor(5))]
    grads = wgrad_bwd(rows, pairs, CHIP, scaling=0.5)
    for (coefficients, _), grad in zip(pairs, grads, strict=True):
        true = 0.5 * coefficients.view(T, -1).t().double() @ rows[:, :NEAR].double()
        _same(grad[..., :NEAR].reshape(true.shape), true)


@pytest.mark.parametrize(("experts", "splits"), [(6, 2), (1, 3)], ids=["a large gradient", "large only with its splits"])
def test_weight_gradients_from_splits(experts: int, splits: int, start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last features of the last row, from the last program of the sum."""
    last = (experts * F - 1) // configs.REDUCE_TILE.F
    start(lambda kernel, grid: ((1,), last) if kernel == "_reduce_bwd_kernel" else ((1, *grid[1:]), grid[0] - 1))
    monkeypatch.setattr(configs, "wgrad_plan", lambda *sizes: WgradPlan(TILE, splits, configs.ceil_div(T, splits)))
    rows, coefficients = untouched((T, F), torch.float32), torch.randn(T, experts)
    rows[:, -NEAR:] = torch.randn(T, NEAR)
    (grad,) = wgrad_bwd(rows, [(coefficients, untouched((experts, F), torch.float32))], CHIP, scaling=0.5)
    _same(grad[-1, -NEAR:], 0.5 * coefficients[:, -1].double() @ rows[:, -NEAR:].double())


def _route(experts: int) -> Tensor:
    """All tokens to the last expert."""
    kept, bounds = torch.full((T,), experts - 1), torch.zeros(experts + 1)
    bounds[-1] = T
    return torch.cat([kept, torch.arange(T), bounds])[None].int()


def test_grouped_expand_and_weight_gradients(start: Callable) -> None:
    start(lambda kernel, grid: ((1, *grid[1:]), 0))
    route, factor, rows = _route(E), _factor(E, R), _factor(T)
    v, out = torch.randn(T, 1, R), untouched((T, F), torch.float32)
    grouped_expand_fwd(v, factor, route, out, ALL_TOKENS, scaling=0.5)
    _same(out[:, :NEAR], 0.5 * v[:, 0].double() @ factor[-1, :, :NEAR].double())
    grad = grouped_wgrad_bwd(rows, v, untouched((E, R, F), torch.float32), route, TILE, scaling=0.5)
    _same(grad[-1, :, :NEAR], 0.5 * v[:, 0].t().double() @ rows[:, :NEAR].double())


def test_grouped_shrink(start: Callable) -> None:
    """It walks over all features: here many experts and ranks make the factor large."""
    start(lambda kernel, grid: ((2, 1), 0))
    experts, ranks, features = 256, 128, 2**16 + 512
    assert (experts - 1) * ranks * features > 2**31
    rows, factor = torch.randn(T, features), untouched((experts, ranks, features), torch.float32)
    factor[-1] = torch.randn(ranks, features) * features**-0.5
    out = untouched((T, 1, ranks), torch.float32)
    tile = Tile(T=16, F=8192, ER=ranks, E=experts, R=ranks)
    grouped_shrink_fwd(rows, factor, _route(experts), out, tile, by_expert=False, scaling=0.5)
    _same(out[:, 0], 0.5 * rows.double() @ factor[-1].t().double())
