"""The route of the Triton backend: which experts each token keeps, and the tokens sorted by expert without ATen's sorts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from lmoe_kernels import ops
from lmoe_kernels.backends.triton import host, route
from lmoe_kernels.backends.triton.configs import block_of
from lmoe_kernels.backends.triton.plans import Tile
from lmoe_kernels.options import Options, Sizes, Wanted
from tests.problems import Case, gradients, leaves_of, make_problem
from tools import calls
from tools.interpreter.bytes import counted, of_tensor
from tools.interpreter.races import race_checked

GROUPED = Case(T=45, I=9, O=10, E=20, R=14, top_k=1, outside_logits=True)  # grouped by its sizes, with nothing forced


def _random(T: int, E: int) -> Tensor:
    return torch.randn(T, E)


def _with_ties(T: int, E: int) -> Tensor:
    return torch.randn(T, E).round()


def _all_alike(T: int, E: int) -> Tensor:
    """Every token keeps the same experts, and the others have no tokens."""
    return torch.zeros(T, E).index_fill(1, torch.tensor([E // 2, E - 1]), 5.0)


def _with_nan(T: int, E: int) -> Tensor:
    logits = torch.randn(T, E)
    logits[::3, E // 2] = float("nan")
    logits[::5] = float("-inf")
    return logits


def _kept(logits: Tensor, K: int) -> Tensor:
    """Of equal logits the one of the lower index, and a NaN above all numbers: (K, T), in the order of the indices."""
    ranked = logits.nan_to_num(torch.inf, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return ranked[:, :K].sort(dim=1).values.t()


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")  # of a token with -inf alone
@pytest.mark.parametrize(("most_tiles", "renormalize"), [(128, True), (3, False)], ids=["a tile a step", "several steps"])
@pytest.mark.parametrize("draw", [_random, _with_ties, _all_alike, _with_nan])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 5, 2), (1, 3, 1), (17, 2, 1), (49, 33, 5), (65, 16, 7), (115, 20, 2)])
def test_a_route_is_the_choice_and_the_stable_sort(
    T: int, E: int, K: int, draw: Callable, renormalize: bool, most_tiles: int, monkeypatch: pytest.MonkeyPatch, watch
) -> None:
    monkeypatch.setattr(route, "MOST_TILES", most_tiles)
    logits, options = draw(T, E), Options(top_k=K, renormalize=renormalize)
    tile = Tile(T=16, F=16, ER=16, E=block_of(E))
    with race_checked(), counted():  # the second refuses what lies outside of a kernel's arguments
        gates, found = route.route_fwd(torch.empty(T, 1), Sizes(T, 1, 1, E, 1, E), options, tile, gate_logits=logits)
    experts, order, bounds = found.split([T, T, E + 1], dim=1)
    assert torch.equal(experts, _kept(logits, K).int())
    ordered, by_expert = experts.sort(dim=1, stable=True)
    assert torch.equal(order, by_expert.int())
    assert torch.equal(
        bounds, torch.searchsorted(ordered.contiguous(), torch.arange(E + 1).expand(K, -1).contiguous()).int()
    )
    dropped = torch.ones(T, E, dtype=torch.bool).scatter(1, _kept(logits, K).t(), value=False)
    among = logits.masked_fill(dropped, float("-inf")) if renormalize else logits
    torch.testing.assert_close(gates, among.softmax(dim=1).gather(1, experts.t().long()).t(), equal_nan=True)


def test_more_tokens_make_larger_tiles_and_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(host, "launch", lambda kernel, grid, *args, tile, **constants: grids.append(grid))
    for T in (1, 16, 1000, 2048, 2049, 10**6):
        route.route_fwd(
            torch.empty(T, 1, device="meta"), Sizes(T, 1, 1, 64, 1, 64), Options(top_k=2), Tile(T=16, F=16, ER=16, E=64)
        )
    assert grids == [grid for tiles in (1, 1, 63, 128, 65, 123) for grid in ((tiles,), (tiles, 2))]


def test_bytes() -> None:
    """Logits are read once, counts by every tile, and experts once more."""
    T, E, K, tiles = 100, 20, 3, 7
    logits = torch.randn(T, E)
    with counted() as counts:
        _, found = route.route_fwd(
            torch.empty(T, 1), Sizes(T, 1, 1, E, 1, E), Options(top_k=K), Tile(T=16, F=16, ER=16, E=32), gate_logits=logits
        )
    assert of_tensor(counts, logits).loaded == logits.nbytes
    assert of_tensor(counts, found).loaded == 4 * K * T
    assert of_tensor(counts, found).stored == found.nbytes
    of_counts = [count for access, count in counts.items() if access.argument == "counts"]
    assert sum(count.stored for count in of_counts) == 4 * K * tiles * E
    assert sum(count.loaded for count in of_counts) == 4 * K * tiles * E * tiles


class _Aten(TorchDispatchMode):
    """Notes the operations of ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [GROUPED, replace(GROUPED, outside_logits=False)], ids=str)
def test_aten_only_allocates_and_the_backward_does_not_route(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, launched = make_problem(case, torch.float32), []
    monkeypatch.setattr(host, "launch", lambda kernel, *args, **constants: launched.append(kernel.fn.__name__))
    x, factors = problem.tensors["x"], calls.factors_of(problem.tensors)
    with _Aten() as aten:
        _, saved = calls.forward_saved("triton", x, factors, case.options)
        of_forward = launched.copy()
        launched.clear()
        calls.backward("triton", problem.dy, x, factors, saved, case.options, dlogits=problem.dlogits)
    assert aten.seen <= {
        "aten::new_empty",
        "aten::empty_like",
        "aten::promote_types",
        "aten::slice.Tensor",
        "aten::unsqueeze",
    }
    routed = ["_route_fwd_kernel", "_group_fwd_kernel", "_grouped_shrink_fwd_kernel", "_grouped_mix_fwd_kernel"]
    gate = [] if case.outside_logits else ["_shrink_fwd_kernel"]
    assert of_forward == gate + routed + ["_grouped_expand_fwd_kernel"] * case.options.kept(case.E)
    assert launched[:2] == ["_grouped_shrink_fwd_kernel", "_grouped_mix_bwd_kernel"]
    assert not set(routed[:2]) & set(launched)


@pytest.mark.parametrize("renormalize", [True, False], ids=["of the kept", "of all"])
def test_only_the_gradient_of_b_recomputes_the_gates(renormalize: bool, watch) -> None:
    case = replace(GROUPED, T=80, top_k=2, renormalize=renormalize, outside_logits=False)
    problem = make_problem(case, torch.float64)
    x, factors = problem.tensors["x"], calls.factors_of(problem.tensors)
    of_b = Wanted(*(name == "lora_b" for name in Wanted._fields))
    grads = {}
    for backend in ("reference", "triton"):
        _, saved = calls.forward_saved(backend, x, factors, case.options)
        with counted() as counts:
            grads[backend] = calls.backward(backend, problem.dy, None, factors, saved, case.options, wanted=of_b).lora_b
    assert {access.kernel for access in counts} == {"_grouped_mix_fwd_kernel", "_grouped_wgrad_bwd_kernel"}
    torch.testing.assert_close(grads["triton"], grads["reference"])


def test_a_backward_without_the_route_is_refused() -> None:
    problem = make_problem(GROUPED, torch.float32)
    x, factors = problem.tensors["x"], calls.factors_of(problem.tensors)
    _, saved = calls.forward_saved("triton", x, factors, GROUPED.options)
    with pytest.raises(ValueError, match="lmoe: route must be the tensor that the forward returned, got None"):
        calls.backward("triton", problem.dy, x, factors, saved._replace(route=None), GROUPED.options)


@pytest.mark.parametrize("T", [45, 5], ids=["grouped", "too few to group"])
def test_the_route_is_saved_in_the_shape_that_is_traced(T: int) -> None:
    problem = make_problem(replace(GROUPED, T=T, outside_logits=False), torch.float32)
    factors = calls.factors_of(problem.tensors)
    arguments = (problem.tensors["x"], *factors, None, None, None, True, "triton", *problem.case.options)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.forward, arguments, test_utils=utilities)
    saved = ops.forward(*arguments)[1:]
    assert saved[2].shape == (1, 2 * T + 21)
    wanted = [*calls.everything(factors), False]
    backward = (
        problem.dy,
        None,
        problem.tensors["x"],
        *factors,
        None,
        None,
        *saved,
        wanted,
        "triton",
        *problem.case.options,
    )
    torch.library.opcheck(ops.backward, backward, test_utils=utilities)


def test_compiled_and_checkpointed() -> None:
    problem = make_problem(GROUPED, torch.float64)
    leaves = leaves_of(problem.tensors)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return problem.call("triton", **dict(zip(leaves, tensors, strict=True)))

    expected = gradients(problem, call(*leaves.values()), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for results in (compiled(*leaves.values()), checkpoint(call, *leaves.values(), use_reentrant=False)):
        for name, grad in gradients(problem, results, leaves).items():
            assert torch.equal(grad, expected[name]), name
