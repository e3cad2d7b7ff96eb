"""A plain call runs the bodies of the ops directly; whatever may want to see an op still sees it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_kernels import dispatch, lmoe, ops
from lmoe_kernels.options import Problem
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome

NAMES = ("x", "lora_a", "lora_b", "gate_weight")


def _arguments() -> dict[str, Tensor]:
    return leaves_of(make_problem(Case(T=3, I=5, O=4, E=3, R=2), torch.float32).tensors)


def _gradients(t: dict[str, Tensor], dy: Tensor | None = None) -> tuple[Tensor, ...]:
    y = lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])
    return torch.autograd.grad(y, [t[name] for name in NAMES], torch.ones_like(y) if dy is None else dy)


class _Ops:
    """Counts the calls of the two ops, and lets them through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for name in ("forward", "backward"):
            monkeypatch.setattr(ops, name, self._counted(name, getattr(ops, name)))

    def _counted(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.seen.append(name)
            return op(*args)

        return call


def test_a_plain_call_needs_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called, t = _Ops(monkeypatch), _arguments()
    _gradients(t)
    _gradients({name: torch.nn.Parameter(tensor.detach()) for name, tensor in t.items()})
    with torch.no_grad():
        lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])
    with torch.inference_mode():
        lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])
    assert called.seen == []


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _profiled() -> Iterator[None]:
    with profile(activities=[ProfilerActivity.CPU]) as events:
        yield
    names = {event.key for event in events.key_averages()}
    assert {"lmoe_kernels::forward", "lmoe_kernels::backward"} <= names


@pytest.mark.parametrize("watching", [_Dispatched, _profiled], ids=["dispatch mode", "profiler"])
def test_a_mode_and_the_profiler_see_both_ops(watching: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called, t = _Ops(monkeypatch), _arguments()
    expected = _gradients(t)
    with watching():
        got = _gradients(t)
    assert called.seen == ["forward", "backward"]
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("watching", [_Functions, lambda: torch.device("cpu")], ids=["function mode", "default device"])
def test_a_mode_of_functions_sees_the_forward(watching: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch leaves such a mode before a backward."""
    called, t = _Ops(monkeypatch), _arguments()
    with watching():
        lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])
    assert called.seen == ["forward"]


@pytest.mark.parametrize(
    ("forward_seen", "backward_seen", "choices"), [(False, False, 1), (False, True, 1), (True, False, 2), (True, True, 2)]
)
def test_the_backward_takes_what_the_forward_chose(
    forward_seen: bool, backward_seen: bool, choices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that ran as an op chose inside it, and the backward chooses again."""
    chosen, choose, t = [], dispatch.choose, _arguments()

    def counted(op: str, problem: Problem, backend: str) -> str:
        chosen.append(choose(op, problem, backend))
        return chosen[-1]

    monkeypatch.setattr(dispatch, "choose", counted)
    with _Dispatched() if forward_seen else nullcontext():
        y = lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])
    with _Dispatched() if backward_seen else nullcontext():
        y.sum().backward()
    assert chosen == ["torch"] * choices


def test_fake_tensors_go_through_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    called = _Ops(monkeypatch)
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(t.detach()).requires_grad_() for name, t in _arguments().items()}
    gradients = _gradients(fakes)  # outside the mode
    assert all(isinstance(g, FakeTensor) and g.shape == fakes[name].shape for name, g in zip(NAMES, gradients, strict=True))
    assert called.seen == ["forward", "backward"]


def test_make_fx_traces_the_ops() -> None:
    t = _arguments()
    graph = make_fx(lambda *leaves: _gradients(dict(zip(NAMES, leaves, strict=True))))(*(t[name] for name in NAMES)).graph
    assert {ops.forward, ops.backward} <= {node.target for node in graph.nodes}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_traces_the_op() -> None:
    t = {name: tensor.detach() for name, tensor in _arguments().items()}
    traced = torch.jit.trace(lambda x: lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"]), t["x"])
    assert "lmoe_kernels::forward" in str(traced.graph)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_see_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    called = _Ops(monkeypatch)
    t = {name: tensor.detach() for name, tensor in _arguments().items()}
    loss = torch.func.grad(lambda x: lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"]).sum())
    torch.vmap(loss)(t["x"][:, None])
    assert set(called.seen) == {"forward", "backward"}


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_sees_the_ops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever tensor is of the subclass, forward and backward compute on it."""
    called, t = _Ops(monkeypatch), _arguments()
    expected = _gradients(t)
    t[name] = TwoTensor(t[name].detach(), t[name].detach().clone()).requires_grad_()
    got = _gradients(t)
    assert called.seen == ["forward", "backward"]
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b.a if isinstance(b, TwoTensor) else b)


def test_an_incoming_gradient_of_a_subclass_sees_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called, t = _Ops(monkeypatch), _arguments()
    y = lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])
    ones = torch.ones_like(y)
    (got,) = torch.autograd.grad(y, [t["lora_b"]], TwoTensor(ones, ones.clone()))
    assert called.seen == ["backward"]
    assert isinstance(got, TwoTensor)


def _negated(t: Tensor) -> Tensor:
    """The same numbers, stored with the other sign: negated when they are read."""
    return torch._neg_view(-t)


@pytest.mark.parametrize(
    "case", [Case(T=3), Case(T=3, outside_logits=True), Case(T=3, gate_bias=True, linear=True)], ids=str
)
def test_lazily_negated_tensors(case: Case, backend: str, exact: torch.dtype, watch) -> None:
    """What reads memory must not miss their sign; the imaginary part of a conjugate is such a tensor."""
    problem = make_problem(case, exact)
    leaves = {name: _negated(t).detach().requires_grad_() for name, t in problem.tensors.items()}
    assert leaves["x"].is_neg()
    results = problem.call(backend, **leaves)
    incoming = [_negated(problem.dy), _negated(problem.dlogits.to(results[1].dtype))]
    gradients = torch.autograd.grad(results, list(leaves.values()), incoming)
    ours = {"y": results[0].detach(), "router_logits": results[1].detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_all_no_worse(problem, ours)


def test_a_tensor_that_outlives_its_transform() -> None:
    t, left = _arguments(), []

    def keep(x: Tensor) -> Tensor:
        left.append(x)
        return x.sum()

    torch.func.grad(keep)(t["x"].detach())
    y, of_left = (lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"]) for x in (t["x"].detach(), left[0]))
    gradients = (torch.autograd.grad(result.sum(), [t[name] for name in NAMES[1:]]) for result in (y, of_left))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case", [Case(T=1, linear=True), Case(T=17, linear=True, gate_bias=True), Case(T=1, top_k=2)], ids=str
)
def test_inputs_and_incoming_gradients_are_never_written(case: Case, dtype: torch.dtype, watch) -> None:
    problem = make_problem(case, dtype)
    leaves = leaves_of(problem.tensors)
    given = [*leaves.values(), problem.dy, problem.dlogits]
    before = [(t.detach().clone(), t._version) for t in given]
    outcome(problem, problem.call("torch", **leaves), leaves)
    if not case.linear:
        base = torch.randn(case.T, case.O).to(dtype)
        given, before = [*given, base], [*before, (base.clone(), base._version)]
        lmoe(leaves["x"], leaves["lora_a"], leaves["lora_b"], gate_weight=leaves["gate_weight"], base=base, top_k=case.top_k)
    for t, (numbers, version) in zip(given, before, strict=True):
        assert torch.equal(t, numbers)
        assert t._version == version
