"""Every Triton kernel on tokens whose elements lie past 2^31 in every tensor, as 32-bit offsets cannot reach them.

There are 2^30 tokens before the few that are looked at. Of those tokens neither memory nor time is taken: tensors are
mapped, not committed, and kernels are started on the last tiles alone.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lmoe_kernels.backends.triton import configs
from lmoe_kernels.backends.triton.plans import Chip, WgradPlan
from lmoe_kernels.options import Sizes
from tests import plans
from tests.problems import Case, Problem, make_problem
from tests.triton.far import BEFORE, behind_many_others, start_the_last_tiles_alone
from tools import calls
from tools.interpreter.bytes import counted

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

    start_the_last_tiles_alone(case.T, monkeypatch)
    with counted() as counts:  # which refuses what lies outside of a kernel's arguments
        results = _forward_and_backward(problem, base, behind_many_others)
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
