"""The ops as PyTorch's machinery sees them: opcheck, torch.compile, torch.export, torch.func.

What is compared is compared in float64, where a wrong formula shows and the order of a sum does not.
"""

import pytest
import torch

from lmoe_kernels import LMoELinear, lmoe, ops, use_backend
from tests.problems import Case, leaves_of, make_problem

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs the ops sample by sample


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "case", [Case(linear=True, top_k=2, renormalize=False), Case(outside_logits=True, shared_a=True), Case(T=0)], ids=str
)
def test_opcheck(case: Case) -> None:
    problem = make_problem(case, torch.float32)
    t = problem.tensors
    gate = t.get("gate_weight")
    args = (t["x"], t["lora_a"], t["lora_b"], gate, t.get("gate_logits"), t.get("weight"), t.get("bias"))
    options = case.options
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.forward, (*args, *options, True, "torch"), test_utils=utilities)
    torch.library.opcheck(ops.forward, (*args, *options, False, "torch"), test_utils=utilities)
    _, logits, u = ops.forward(*args, *options, True, "torch")
    logits = logits if gate is not None else t["gate_logits"]
    for mask in ([True] * 5, [False, True, False, True, False], [True, False, False, False, False]):
        backward = (problem.dy, None, t["x"], t["lora_a"], t["lora_b"], gate, logits, u, t.get("weight"))
        torch.library.opcheck(ops.backward, (*backward, *options, mask, "torch"), test_utils=utilities)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph_forward_and_backward(compiler: str) -> None:
    problem = make_problem(Case(T=12, linear=True, top_k=2, renormalize=False), torch.float64)
    names = list(problem.tensors)

    def function(*tensors):
        y, logits = problem.call(**dict(zip(names, tensors, strict=True)))
        return y.relu(), logits

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    leaves = leaves_of(problem.tensors)
    expected, got = function(*leaves.values()), compiled(*leaves.values())
    dlogits = torch.randn_like(expected[1])
    grads = [torch.autograd.grad(r, list(leaves.values()), [problem.dy, dlogits]) for r in (expected, got)]
    for a, b in zip((*expected, *grads[0]), (*got, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves.values())[0], expected[0])


def test_compiled_function_follows_dynamic_sizes_and_the_chosen_backend() -> None:
    t = make_problem(Case(T=100), torch.float64).tensors
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x: lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"]), fullgraph=True, dynamic=True, backend=keep
    )
    for tokens in (6, 9, 40, 100):  # to both sides of 64, where the choice among a GPU's backends changes
        x = t["x"][:tokens]
        torch.testing.assert_close(compiled(x), lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"]))
    assert len(graphs) == 1
    with use_backend("reference"):
        compiled(t["x"])
    assert "'reference'" in graphs[-1].code or "reference" in str(graphs[-1].graph)


def test_an_exported_layer_runs_with_any_number_of_tokens() -> None:
    layer = LMoELinear(12, 8, num_experts=3, rank=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(100, 12, dtype=torch.float64)
    exported = torch.export.export(layer, (x[:7],), dynamic_shapes=({0: torch.export.Dim("T")},))
    assert ops.forward in {node.target for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(x), layer(x))  # gradients are on here, and the parameters ask for them


def test_func_grad_and_vmap() -> None:
    t = make_problem(Case(), torch.float64).tensors

    def loss(x, lora_a):
        return lmoe(x, lora_a, t["lora_b"], gate_weight=t["gate_weight"]).square().sum()

    x, lora_a = t["x"].clone().requires_grad_(), t["lora_a"].clone().requires_grad_()
    expected = torch.autograd.grad(loss(x, lora_a), (x, lora_a))
    got = torch.func.grad(loss, argnums=(0, 1))(t["x"], t["lora_a"])
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)

    batch = torch.randn(3, *t["x"].shape, dtype=torch.float64)
    per_sample = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(batch, t["lora_a"])
    for sample, gradient in zip(batch, per_sample, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss, argnums=1)(sample, t["lora_a"]))
