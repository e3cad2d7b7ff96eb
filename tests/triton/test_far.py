"""Every Triton kernel on tokens whose elements lie past 2^31 in every tensor, as 32-bit offsets cannot reach them.

There are 2^30 tokens before the few that are looked at. Of those tokens neither memory nor time is taken: tensors are
mapped, not committed, and kernels are started on the last tiles alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.plans import Chip, Tile, WgradPlan
from lmoe_kernels.options import Sizes
from tests import plans
from tests.problems import Case, Problem, make_problem
from tools import calls
from tools.far import untouched
from tools.interpreter.bytes import counted

BEFORE = 2**30  # tokens: a tensor with two elements for each, and the third slot of a route, reach past 2^31 elements
CASES = {
    "_one_pass_fwd_kernel": (1, Case(T=20, I=40, O=37, E=16, R=4)),
    "_shrink_mix_fwd_kernel": (1, Case(T=20, I=40, O=37, E=3, R=16, shared_a=True)),
    "_shrink_fwd_kernel": (64, Case(T=20, I=260, O=257, E=16, R=8, mixing="outputs")),
    "_grouped_shrink_fwd_kernel": (1, Case(T=20, I=40, O=37, E=9, R=8, top_k=3, renormalize=False)),
}


@pytest.mark.parametrize("first_kernel", CASES)
def test_the_last_tokens_of_many(first_kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processors, case = CASES[first_kernel]
    chip = Chip("interpreter", processors, 1 << 16)
    plans.set_chip(chip, monkeypatch)
    _plans_of_few_tokens(case, chip, monkeypatch)
    problem, base = make_problem(case, torch.bfloat16), torch.randn(case.T, case.O).bfloat16()
    expected = _forward_and_backward(problem, base, lambda rows: rows)

    _start_the_last_tiles_alone(case, monkeypatch)
    with counted() as counts:  # which refuses what lies outside of a kernel's arguments
        results = _forward_and_backward(problem, base, _behind_many_others)
    assert first_kernel in {access.kernel for access in counts}
    for name, result in results.items():
        assert torch.equal(result[BEFORE:] if len(result) > BEFORE else result, expected[name]), name


def _forward_and_backward(problem: Problem, base: Tensor, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x, factors, options = place(problem.tensors["x"]), calls.factors_of(problem.tensors), problem.case.options
    y, saved = calls.forward_saved("triton", x, factors, options, base=place(base))
    dy, dlogits = place(problem.dy), place(problem.dlogits)
    grads = calls.backward("triton", dy, x, factors, saved, options, dlogits=dlogits)
    results = {"y": y, "logits": saved.logits} | {f"d{name}": grad for name, grad in grads._asdict().items()}
    return {name: result for name, result in results.items() if result is not None}


def _behind_many_others(rows: Tensor) -> Tensor:
    far = untouched((BEFORE + len(rows), *rows.shape[1:]), rows.dtype)
    far[BEFORE:] = rows
    return far


def _plans_of_few_tokens(case: Case, chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of the few tokens also where there are many; a weight gradient has those in front in two splits."""
    wgrad = configs.wgrad_plan

    def wgrad_plan(tokens: int, *rest) -> WgradPlan:
        tile = wgrad(case.T, *rest).tile
        return WgradPlan(tile, 1, case.T) if tokens == case.T else WgradPlan(tile, 3, BEFORE // 2)

    experts_of_a = 1 if case.shared_a else case.E
    few, many = (Sizes(T, case.I, case.O, case.E, case.R, experts_of_a) for T in (case.T, BEFORE))
    dtype = torch.bfloat16
    plans.let_few_ranks_be_grouped(monkeypatch)
    chosen = {
        "forward_plan": configs.forward_plan(few, dtype, chip),
        "backward_plan": configs.backward_plan(few, dtype, chip),
        "grouped_plan": configs.grouped_plan(many, case.options, dtype, chip),
    }
    for name, plan in chosen.items():
        monkeypatch.setattr(configs, name, lambda *_, plan=plan: plan)
    monkeypatch.setattr(configs, "wgrad_plan", wgrad_plan)


def _start_the_last_tiles_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    launch, builder = host.launch, interpreter.InterpreterBuilder
    program_id = builder.create_get_program_id

    def launch_last(kernel, grid: tuple[int, ...], *args, tile: Tile, **constants) -> None:
        splits = grid[2] if kernel.fn.__name__ == "_wgrad_bwd_kernel" else 1
        programs_of_tile = grid[0] // tile.tiles_of(BEFORE + case.T)  # 0 where programs are not for tiles of tokens
        before = programs_of_tile * (BEFORE // tile.T)
        if "tokens_of_tile" in kernel.arg_names:  # of the sort, whose last tile begins at BEFORE
            before = grid[0] - 1
        in_groups = {"route_ptr", "factor_ptr"} <= set(kernel.arg_names)  # then the few tokens are the first in order
        first = (0 if in_groups else before, 0, splits - 1)
        grid = (grid[0] - before, *grid[1:2], *([1] if splits > 1 else grid[2:]))

        def shifted(self: Any, axis: int) -> Any:
            program = program_id(self, axis)
            program.data += first[axis]
            return program

        with monkeypatch.context() as context:
            context.setattr(builder, "create_get_program_id", shifted)
            launch(kernel, grid, *args, tile=tile, **constants)

    def new_empty(self: Tensor, *size, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        return untouched(torch.Size(size if isinstance(size[0], int) else size[0]), dtype or self.dtype)

    monkeypatch.setattr(host, "launch", launch_last)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: untouched(tuple(like.shape), like.dtype))
