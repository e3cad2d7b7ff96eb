"""The bias of the choice: which experts a token gets, with the gates of its logits without the bias, in every backend."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmoe_kernels import LMoELinear, reference
from lmoe_kernels.mixture import Choice, add_experts
from lmoe_kernels.options import Factors
from tests.problems import SHAPES, Case, Problem, gradients, leaves_of, make_problem
from tools.error_rule import ORDERS, assert_no_worse, reordered
from tools.factored import factored

CASES = [
    Case(T=19, I=24, O=40, E=6, R=4, top_k=2),
    Case(T=19, I=24, O=40, E=6, R=4, top_k=2, mixing="outputs", linear=True),
    Case(T=13, I=24, O=40, E=12, R=4, top_k=1, mixing="outputs", shared_a=True),
    Case(T=13, I=24, O=40, E=40, R=8, top_k=3, gate_bias=True),
]


def ours(problem: Problem, tensors: dict[str, Tensor], choice: Choice, backend: str) -> tuple[Tensor, Tensor]:
    """(y, router_logits) of the function that the layers call."""
    case = problem.case
    options = {**case.keywords, "backend": backend, "return_router_logits": True}
    options |= {name: tensors.get(name) for name in ("gate_weight", "gate_bias")}
    base: torch.nn.Module | Tensor = torch.zeros(*tensors["x"].shape[:-1], case.O, dtype=tensors["x"].dtype)
    if case.linear:
        base = torch.nn.Linear(case.I, case.O, dtype=tensors["x"].dtype).requires_grad_(False)
        base.weight.data, base.bias.data = tensors["weight"], tensors["bias"]
    y, logits = add_experts(base, tensors["x"], tensors["lora_a"], tensors["lora_b"], options, choice)
    assert logits is not None
    return y, logits


def by_definition(problem: Problem, tensors: dict[str, Tensor], bias: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """(y, router_logits) in plain PyTorch: the definition in float64, or the factored form in x's dtype."""
    case, wide = problem.case, torch.float64 if exact else torch.float32
    gate_bias = tensors["gate_bias"].to(wide) if "gate_bias" in tensors else None
    logits = F.linear(tensors["x"].to(wide), tensors["gate_weight"].to(wide), gate_bias)
    best = (logits.detach() + bias).sort(dim=1, descending=True).indices[:, : case.top_k]
    of_chosen = torch.full_like(logits, -torch.inf).scatter(1, best, logits.gather(1, best))
    factors = Factors(tensors["lora_a"], tensors["lora_b"], gate_logits=of_chosen)
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"]) if case.linear else None
    if exact:
        return reference.forward(tensors["x"], factors, base, case.options, save=False)[0], logits
    delta, _ = factored(tensors["x"], factors, case.options)
    return delta if base is None else base + delta, logits


def outcome(problem: Problem, results: tuple[Tensor, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: leaf for name, leaf in leaves.items() if name not in ("weight", "bias")}
    return {"y": results[0].detach(), "router_logits": results[1].detach(), **gradients(problem, results, trained)}


def assert_right(problem: Problem, bias: Tensor, backend: str) -> None:
    """Compare results and gradients with the definition in float64 by the error rule."""
    leaves = leaves_of(problem.tensors)
    found = outcome(problem, ours(problem, leaves, Choice(bias, None), backend), leaves)
    leaves = leaves_of(problem.tensors, torch.float64)
    true = outcome(problem, by_definition(problem, leaves, bias, exact=True), leaves)
    plain = []
    for _ in range(ORDERS):
        order = {letter: torch.randperm(getattr(problem.case, letter)) for letter in "IOER"}
        back = {letter: permutation.argsort() for letter, permutation in order.items()}
        dy, dlogits = (reordered(t, SHAPES[n], order) for n, t in (("dy", problem.dy), ("dlogits", problem.dlogits)))
        tensors = {name: reordered(t, SHAPES[name], order) for name, t in problem.tensors.items()}
        other, leaves = Problem(problem.case, tensors, dy, dlogits), leaves_of(tensors)
        results = outcome(other, by_definition(other, leaves, reordered(bias, "E", order), exact=False), leaves)
        plain.append({name: reordered(t, SHAPES[name], back) for name, t in results.items()})
    for name, result in found.items():
        assert_no_worse(name, result, [results[name].to(problem.dy.dtype) for results in plain], true[name])


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), (CASES[1], torch.bfloat16)], ids=str
)
def test_gates_are_those_of_the_chosen_experts_without_the_bias(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    problem, bias = make_problem(case, dtype), 5 * torch.randn(case.E)
    _, logits = by_definition(problem, leaves_of(problem.tensors, torch.float64), bias, exact=True)
    assert not torch.equal(logits.topk(case.top_k).indices, (logits + bias).topk(case.top_k).indices)
    assert_right(problem, bias, backend)


def test_large_logits(backend: str, watch) -> None:
    """exp(logit) overflows, and experts that are not chosen may have the largest logits."""
    problem = make_problem(Case(T=9, I=24, E=5, top_k=2), torch.float32)
    x, gate_weight = problem.tensors["x"], problem.tensors["gate_weight"]
    x.mul_(8).round_().div_(8)[:, 0] = 1.0  # exact logits: one rounding near 512 would be the whole error
    gate_weight.mul_(64).round_().div_(64)[:, 0] = torch.tensor([512.0, 512.0, -512.0, 0.0, 512.0])
    assert_right(problem, torch.tensor([-2000.0, 0.0, 100.0, 0.0, 0.0]), backend)


def test_of_equal_sums_the_lower_expert_is_chosen() -> None:
    load = torch.zeros(40)
    problem = make_problem(Case(T=9, I=8, O=8, E=40, R=2, top_k=3), torch.float32)
    problem.tensors["x"].zero_()  # as of padding
    bias = torch.zeros(40)
    bias[30] = 1.0
    ours(problem, problem.tensors, Choice(bias, load), "torch")
    assert load.nonzero().flatten().tolist() == [0, 1, 30]
    assert (load[[0, 1, 30]] == 9).all()


def test_a_nan_affects_its_token_alone(backend: str) -> None:
    problem = make_problem(Case(T=9, I=24, E=5, top_k=2), torch.float32)
    problem.tensors["x"][4, 0] = float("nan")
    leaves = leaves_of(problem.tensors)
    y, logits = ours(problem, leaves, Choice(torch.randn(5), None), backend)
    (dx,) = torch.autograd.grad((y * problem.dy).sum() + (logits * problem.dlogits).sum(), leaves["x"])
    others = torch.arange(9) != 4
    for result in (y, dx, logits):
        assert result[4].isnan().any()
        assert result[others].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (8,), (1, 8), (2, 3, 8), (2, 0, 8)], ids=str)
def test_shapes_and_counts(shape: tuple[int, ...]) -> None:
    layer = LMoELinear(8, 6, num_experts=4, rank=2, top_k=3, choice_bias=True, output_router_logits=True)
    x = torch.randn(shape)
    for count in (1, 2):
        y = layer(x)
        assert y.shape == (*shape[:-1], 6)
        assert layer.router_logits.shape == (*shape[:-1], 4)
        assert layer.load.sum() == count * 3 * x.numel() / 8
        assert layer.load.max() <= count * x.numel() / 8
    kept = layer.load.clone()
    layer.eval()(x)
    assert torch.equal(layer.load, kept)
    y.sum().backward()


def test_without_a_bias_it_is_top_k() -> None:
    layer = LMoELinear(8, 6, num_experts=4, rank=2, top_k=2, choice_bias=True, gate_bias=True, dtype=torch.float64)
    plain = LMoELinear(8, 6, num_experts=4, rank=2, top_k=2, gate_bias=True, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "choice_bias"})
    x = torch.randn(7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


def test_recomputation_chooses_the_same_experts() -> None:
    layer = LMoELinear(8, 6, num_experts=4, rank=2, top_k=2, choice_bias=True)
    torch.nn.init.normal_(layer.lora_b)
    torch.nn.init.normal_(layer.choice_bias)
    x, dy = torch.randn(7, 8, requires_grad=True), torch.randn(7, 6)
    expected = torch.autograd.grad(layer(x), [x, *filter(lambda p: p.requires_grad, layer.parameters())], dy)
    once = layer.load.clone()
    layer.load.zero_()
    for use_reentrant in (False, True):
        layer.zero_grad()
        x.grad = None
        checkpoint(layer, x, use_reentrant=use_reentrant).backward(dy)
        found = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
        assert all(map(torch.equal, found, expected))
    assert torch.equal(layer.load.sign(), once.sign())
    assert torch.equal(layer.load, 4 * once)


def test_compiled_without_graph_breaks() -> None:
    layer = LMoELinear(8, 6, num_experts=4, rank=2, top_k=2, choice_bias=True)
    torch.nn.init.normal_(layer.lora_b)
    torch.nn.init.normal_(layer.choice_bias)
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(7, 8)
    y = layer(x)
    expected = torch.autograd.grad(y.square().sum(), layer.gate_weight)
    once = layer.load.clone()
    found = compiled(x)
    assert torch.equal(layer.load, 2 * once)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), layer.gate_weight), expected)
    layer.choice_bias.mul_(-1)
    torch.testing.assert_close(compiled(x), layer(x))
