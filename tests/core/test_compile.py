"""The ops under opcheck, torch.compile, torch.export and torch.func.

Results are compared in float64, so that a wrong formula shows and the order of a sum does not.
"""

import pytest
import torch

from lmoe_kernels import LMoELinear, dispatch, lmoe, ops, reference, use_backend
from lmoe_kernels.options import Wanted
from tests.problems import Case, leaves_of, make_problem
from tools.calls import everything, factors_of

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs the ops sample by sample


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "case",
    [
        Case(linear=True, gate_bias=True, top_k=2, renormalize=False),
        Case(outside_logits=True, shared_a=True),
        Case(outside_logits=True, softmax=False),
        Case(linear=True, dropout=0.5),
        Case(T=0),
    ],
    ids=str,
)
def test_opcheck(case: Case) -> None:
    problem = make_problem(case, torch.float32)
    t = problem.tensors
    factors = factors_of(t)
    seed = torch.tensor(7) if case.dropout else None
    args = (t["x"], *factors, t.get("weight"), t.get("bias"), seed)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    for save in (True, False):
        torch.library.opcheck(ops.forward, (*args, save, "torch", *case.options), test_utils=utilities)
    _, *saved = ops.forward(*args, True, "torch", *case.options)
    inputs = (t["x"], *factors, t.get("weight"), seed, *saved)
    every, of_x = everything(factors), Wanted(True, *[False] * 5)
    for wanted in (every, every._replace(x=False, lora_b=False), of_x):
        backward = (problem.dy, None, *inputs, [*wanted, case.linear], "torch", *case.options)
        torch.library.opcheck(ops.backward, backward, test_utils=utilities)


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
    for tokens in (6, 9, 40, 100):  # below and above 16, where the automatic choice on a GPU changes
        x = t["x"][:tokens]
        torch.testing.assert_close(compiled(x), lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"]))
    assert len(graphs) == 1
    with use_backend("reference"):
        compiled(t["x"])
    assert "'reference'" in graphs[-1].code or "reference" in str(graphs[-1].graph)


class _Calls:
    """Two backends, one for at most 8 tokens and one for more; each call and its number of tokens are recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str, int]] = []
        rows = {
            "few": dispatch.Backend(
                "none.such", lambda problem: "too many" if problem.sizes.T > 8 else None, lambda p: None
            ),
            "many": dispatch.Backend("none.such", lambda problem: None, lambda problem: None),
        }
        monkeypatch.setattr(dispatch, "BACKENDS", rows)
        monkeypatch.setattr(dispatch, "load", self._load)

    def _load(self, name: str) -> dispatch.Functions:
        def forward(x, *args, **kwargs):
            self.seen.append((name, "forward", len(x)))
            return reference.forward(x, *args, **kwargs)

        def backward(dy, *args, **kwargs):
            self.seen.append((name, "backward", len(dy)))
            return reference.backward(dy, *args, **kwargs)

        return dispatch.Functions(forward, backward, reference.dropout)


def _drop_all(guards: list) -> list[bool]:
    return [False] * len(guards)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_without_guards_every_call_takes_the_backend_of_its_own_size(compiler: str, monkeypatch) -> None:
    """Servers compile once and drop the guards: decode must not run prefill's kernel, nor prefill decode's."""
    calls = _Calls(monkeypatch)
    t = make_problem(Case(T=100), torch.float64).tensors
    lora_b = t["lora_b"].clone().requires_grad_()
    compiled = torch.compile(
        lambda x: lmoe(x, t["lora_a"], lora_b, gate_weight=t["gate_weight"]),
        fullgraph=True, dynamic=True, backend=compiler, options={"guard_filter_fn": _drop_all},
    )  # fmt: skip
    for tokens in (100, 3, 40, 8):
        compiled(t["x"][:tokens]).sum().backward()
        name = "few" if tokens <= 8 else "many"
        assert calls.seen == [(name, "forward", tokens), (name, "backward", tokens)]
        calls.seen.clear()


def test_an_unbacked_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size after `nonzero` has no value while torch.compile traces, so a choice made then could not compare it."""
    _Calls(monkeypatch)
    t = make_problem(Case(T=100), torch.float64).tensors
    lora_b = t["lora_b"].clone().requires_grad_()

    def chosen_tokens(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return lmoe(x[chosen], t["lora_a"], lora_b, gate_weight=t["gate_weight"])

    chosen = torch.rand(100) < 0.5
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        y = torch.compile(chosen_tokens, fullgraph=True, backend="aot_eager")(t["x"], chosen)
    torch.testing.assert_close(y, chosen_tokens(t["x"], chosen))
    (got,) = torch.autograd.grad(y.sum(), lora_b)
    torch.testing.assert_close(got, torch.autograd.grad(chosen_tokens(t["x"], chosen).sum(), lora_b)[0])


def test_an_exported_layer_runs_with_any_number_of_tokens() -> None:
    layer = LMoELinear(12, 8, num_experts=3, rank=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(100, 12, dtype=torch.float64)
    exported = torch.export.export(layer, (x[:7],), dynamic_shapes=({0: torch.export.Dim("T")},))
    assert ops.forward in {node.target for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(x), layer(x))  # with gradients enabled, and parameters that require them


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
