"""Mix: which experts top_k keeps, logits that are not finite, and tokens whose numbers do not fit into shared memory."""

import pytest
import torch

from lmoe_kernels import lmoe
from lmoe_kernels.backends.cuda import backward, forward
from tests import plans
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome

PLANS = ["parts", "one pass", "decode"]  # parts: the mix kernels; the others share their softmax
EXPERTS = [5, 8, 40, 70]  # fewer than a warp has lanes, and more


def _outputs(backend: str, tensors: dict[str, torch.Tensor], **options: object) -> list[torch.Tensor]:
    """The output, and the gradients of its sum."""
    leaves = leaves_of(tensors)
    y = lmoe(leaves["x"], leaves["lora_a"], leaves["lora_b"], gate_logits=leaves["gate_logits"], backend=backend, **options)
    y.sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves.values())]


def _tensors(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    T, E = logits.shape
    return {
        "x": torch.randn(T, 16), "lora_a": torch.randn(E, 2, 16), "lora_b": torch.randn(E, 2, 24), "gate_logits": logits,
    }  # fmt: skip


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "not renormalized"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("plan", PLANS)
def test_of_equal_logits_the_first_are_kept(plan: str, experts: int, renormalize: bool, emulated_cuda, monkeypatch) -> None:
    plans.force("cuda", plan, monkeypatch)
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0, 2.5])
    logits = values[torch.randint(0, len(values), (9, experts))]
    logits[0] = 1.0
    logits[1] = torch.randn(experts)
    logits[:, -1] = 0.5  # no token has -inf alone
    tensors = _tensors(logits)
    for top_k in sorted({1, 2, experts // 2, experts - 1, experts}):
        options = {"top_k": top_k, "renormalize": renormalize}
        for ours, right in zip(_outputs("cuda", tensors, **options), _outputs("reference", tensors, **options), strict=True):
            torch.testing.assert_close(ours, right, atol=2e-3, rtol=2e-4)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_logit_that_is_not_a_number_shows(plan: str, experts: int, emulated_cuda, monkeypatch) -> None:
    plans.force("cuda", plan, monkeypatch)
    logits = torch.randn(7, experts)
    logits[0, 2] = torch.nan
    logits[1, 3] = -torch.tensor(torch.nan)
    logits[2] = -torch.inf
    logits[3, 1] = torch.inf
    tensors = _tensors(logits)
    for top_k in (1, 3, experts):
        for renormalize in (True, False):
            options = {"top_k": top_k, "renormalize": renormalize}
            ours, right = (_outputs(backend, tensors, **options)[0] for backend in ("cuda", "reference"))
            assert torch.equal(ours.isnan(), right.isnan())


# In fp32: E R of up to some thousands is kept in shared memory, for one warp or several; more is read again.
LARGE = [
    Case(T=3, I=8, O=16, E=4, R=300),
    Case(T=5, I=8, O=8, E=3, R=160, shared_a=True, mixing="outputs"),
    Case(T=3, I=8, O=16, E=4, R=900, top_k=2, renormalize=False),
    Case(T=3, I=8, O=16, E=6, R=600, shared_a=True, top_k=2, renormalize=False),
    Case(T=2, I=8, O=8, E=40, R=80, top_k=3, mixing="outputs"),
    Case(T=3, I=8, O=16, E=5, R=701, outside_logits=True),
    Case(T=3, I=8, O=16, E=5, R=701, outside_logits=True, softmax=False),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_tokens_with_many_columns(case: Case, emulated_cuda, monkeypatch, watch) -> None:
    plans.force("cuda", "parts", monkeypatch)
    problem = make_problem(case, torch.float32)
    leaves = leaves_of(problem.tensors)
    assert_all_no_worse(problem, outcome(problem, problem.call("cuda", **leaves), leaves))


@pytest.mark.parametrize("parts", [1, 4, 5, 9])
def test_any_number_of_partial_sums(parts: int, emulated_cuda, monkeypatch, watch) -> None:
    """A lane loads four of them at a time."""
    plans.force("cuda", "parts", monkeypatch)
    for module in (forward, backward):
        monkeypatch.setattr(module, "shrink_parts", lambda *sizes: parts)
    for rank in (3, 8):
        problem = make_problem(Case(T=5, I=600, O=592, E=3, R=rank), torch.bfloat16)
        leaves = leaves_of(problem.tensors)
        assert_all_no_worse(problem, outcome(problem, problem.call("cuda", **leaves), leaves))
