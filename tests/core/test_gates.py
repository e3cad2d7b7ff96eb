"""Gates that the caller gives: what they are next to a softmax, static mixtures, dtypes, autocast, compiled functions."""

import pytest
import torch

from lmoe_kernels import explain, lmoe, lmoe_linear
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome

CASES = [
    Case(T=9, outside_logits=True, softmax=False),
    Case(T=9, outside_logits=True, softmax=False, shared_a=True, linear=True),
]


@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_gates_of_a_softmax_are_the_gates_of_its_logits(mixing: str, backend: str, exact: torch.dtype) -> None:
    """Also in their gradient: autograd differentiates the softmax outside of the call."""
    leaves = leaves_of(make_problem(Case(outside_logits=True), exact).tensors)
    args, logits = (leaves["x"], leaves["lora_a"], leaves["lora_b"]), leaves["gate_logits"]
    expected = lmoe(*args, gate_logits=logits, mixing=mixing, backend=backend)
    found = lmoe(*args, gates=logits.softmax(-1), mixing=mixing, backend=backend)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    grads = [torch.autograd.grad(y, list(leaves.values()), dy) for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_a_static_mixture_is_one_row_for_all_tokens(backend: str, exact: torch.dtype) -> None:
    """The weighted sum of the LoRAs; the gradient of the weights is a sum over the tokens. x has more dimensions."""
    t = make_problem(Case(T=12), exact).tensors
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.25], dtype=exact, requires_grad=True)
    x = t["x"].view(3, 4, -1)
    y = lmoe(x, t["lora_a"], t["lora_b"], gates=weights.expand(3, 4, 5), mixing="outputs", backend=backend)
    merged = torch.einsum("e,ero,eri->oi", weights, t["lora_b"], t["lora_a"])
    torch.testing.assert_close(y, torch.nn.functional.linear(x, merged))
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(result, weights, dy)[0] for result in (y, torch.nn.functional.linear(x, merged))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_gates_next_to_half_precision(case: Case, every_plan: str, watch) -> None:
    problem = make_problem(case, torch.bfloat16, torch.float32)
    problem.tensors["gate_logits"] = torch.randn(case.E, case.T).t()
    leaves = leaves_of(problem.tensors)
    results = outcome(problem, problem.call(every_plan, **leaves), leaves)
    assert results["gate_logits"].dtype == torch.float32
    assert not torch.equal(results["gate_logits"], results["gate_logits"].bfloat16().float())
    assert_all_no_worse(problem, results)


def test_autocast_leaves_fp32_gates_as_they_are() -> None:
    t = make_problem(CASES[0], torch.float32).tensors
    args, gates = (t["lora_a"], t["lora_b"]), torch.randn(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = lmoe(t["x"], *args, gates=gates)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, lmoe(t["x"].bfloat16(), *args, gates=gates))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()], ids=str)
def test_any_number_of_tokens(shape: tuple[int, ...], backend: str) -> None:
    t = make_problem(Case(), torch.float32).tensors
    x, gates = torch.randn(*shape, 33, requires_grad=True), torch.randn(*shape, 5, requires_grad=True)
    y = lmoe(x, t["lora_a"], t["lora_b"], gates=gates, backend=backend)
    assert y.shape == (*shape, 41)
    dx, dgates = torch.autograd.grad(y.sum(), [x, gates])
    assert (dx.shape, dgates.shape) == (x.shape, gates.shape)


def test_a_compiled_function_keeps_logits_and_gates_apart() -> None:
    t = make_problem(Case(T=12), torch.float64).tensors
    numbers = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)

    def function(x, gate_logits, gates):
        return lmoe(x, t["lora_a"], t["lora_b"], gate_logits=gate_logits, gates=gates)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for args in ((None, numbers), (numbers, None), (None, numbers)):
        expected, found = function(t["x"], *args), compiled(t["x"], *args)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(y.square().sum(), numbers)[0] for y in (found, expected)]
        torch.testing.assert_close(*grads)
    assert not torch.allclose(function(t["x"], None, numbers), function(t["x"], numbers, None))


def test_an_exported_program_keeps_the_gates() -> None:
    class Mixture(torch.nn.Module):
        def forward(self, x, lora_a, lora_b, gates):
            return lmoe(x, lora_a, lora_b, gates=gates)

    t = make_problem(Case(T=6), torch.float64).tensors
    args = t["x"], t["lora_a"], t["lora_b"], torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.export.export(Mixture(), args).module()(*args), Mixture()(*args))


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_func() -> None:
    t = make_problem(Case(T=6), torch.float64).tensors
    gates = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def loss(x, gates):
        return lmoe(x, t["lora_a"], t["lora_b"], gates=gates).square().sum()

    (expected,) = torch.autograd.grad(loss(t["x"], gates), gates)
    per_token = torch.func.vmap(torch.func.grad(loss, argnums=1))(t["x"][:, None], gates.detach()[:, None])
    torch.testing.assert_close(per_token[:, 0], expected)


def test_renormalize_has_no_meaning_and_explain_accepts_gates() -> None:
    t = make_problem(CASES[1], torch.float32).tensors
    args, gates = (t["x"], t["lora_a"], t["lora_b"]), t["gate_logits"]
    linear = t["x"], t["weight"], t["bias"], t["lora_a"], t["lora_b"]
    assert torch.equal(lmoe(*args, gates=gates, renormalize=False), lmoe(*args, gates=gates))
    assert torch.equal(lmoe_linear(*linear, gates=gates, renormalize=False), lmoe_linear(*linear, gates=gates))
    assert "taken" in explain(*args, gates=gates)
    for function, arguments in ((lmoe_linear, linear), (explain, args)):
        with pytest.raises(ValueError) as caught:
            function(*arguments, gates=gates, gate_logits=gates)  # pyright: ignore[reportCallIssue]
        expected = "exactly one of gate_weight, gate_logits and gates must be given, got gate_logits and gates"
        assert str(caught.value) == f"{function.__name__}: {expected}"
