"""torch.func on the operation: first derivatives are right; second ones raise an error instead of returning zeros."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vjp, vmap

from lmoe_kernels import LMoELinear, lmoe
from tests.problems import Case, make_problem

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap runs the ops sample by sample
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]
CASE = Case(T=4, I=5, O=6, E=4, R=2, top_k=2, renormalize=False)


class _Call:
    """One problem as functions of x: y, a loss, the squared gradient of the loss, and the gradient by plain autograd."""

    def __init__(self) -> None:
        t = make_problem(CASE, torch.float64).tensors
        self.x, self.factors, self.gate_weight = t["x"], (t["lora_a"], t["lora_b"]), t["gate_weight"]

    def y(self, x: Tensor) -> Tensor:
        return lmoe(x, *self.factors, gate_weight=self.gate_weight, top_k=CASE.top_k, renormalize=CASE.renormalize)

    def loss(self, x: Tensor) -> Tensor:
        return self.y(x).square().sum()

    def slope(self, x: Tensor) -> Tensor:
        return grad(self.loss)(x).square().sum()

    def plain_grad(self, x: Tensor, dy: Tensor | None = None) -> Tensor:
        x = x.clone().requires_grad_()
        y = self.y(x)
        return torch.autograd.grad(y, x, 2 * y.detach() if dy is None else dy)[0]


def test_first_derivatives_are_those_of_autograd() -> None:
    call = _Call()
    torch.testing.assert_close(grad(call.loss)(call.x), call.plain_grad(call.x))
    rows = torch.eye(CASE.T * CASE.O, dtype=torch.float64).view(-1, CASE.T, CASE.O)
    expected = torch.stack([call.plain_grad(call.x, row) for row in rows])
    torch.testing.assert_close(jacrev(call.y)(call.x).flatten(0, 1), expected)
    y, pullback = vjp(call.y, call.x)
    torch.testing.assert_close(pullback(2 * y)[0], call.plain_grad(call.x))
    per_token = vmap(grad(call.loss))(call.x[:, None])
    torch.testing.assert_close(per_token[:, 0], call.plain_grad(call.x))


def test_per_sample_gradients_of_a_layer() -> None:
    layer = LMoELinear(5, 6, num_experts=3, rank=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 5, dtype=torch.float64)
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample,)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for i, sample in enumerate(x):
        layer.zero_grad()
        layer(sample).square().sum().backward()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient[i], layer.get_parameter(name).grad)


SECOND: dict[str, Callable[[_Call], object]] = {
    "grad of grad": lambda call: grad(call.slope)(call.x),
    "jacrev of jacrev": lambda call: jacrev(jacrev(call.loss))(call.x),
    "hessian": lambda call: hessian(call.loss)(call.x),
    "jacrev of jacfwd": lambda call: jacrev(jacfwd(call.loss))(call.x),
    "vmap of grad of grad": lambda call: vmap(grad(call.slope))(call.x[:, None]),
    "grad of vmap of grad": lambda call: grad(lambda x: vmap(grad(call.loss))(x[:, None]).square().sum())(call.x),
    "autograd of grad": lambda call: call.slope(call.x.requires_grad_()).backward(),
    "autograd of a sum with grad": lambda call: (call.loss(call.x.requires_grad_()) + call.slope(call.x)).backward(),
    "autograd of jacrev": lambda call: jacrev(call.y)(call.x.requires_grad_()).square().sum().backward(),
}


@pytest.mark.parametrize("form", SECOND)
def test_second_derivatives_are_refused(form: str) -> None:
    call = _Call()
    with pytest.raises(RuntimeError, match=r"^lmoe: .*: there are no second derivatives$"):
        SECOND[form](call)
    assert call.x.grad is None


def test_a_gradient_may_be_used_as_a_constant() -> None:
    call = _Call()
    x = call.x.clone().requires_grad_()
    (call.loss(x) + (grad(call.loss)(x).detach() * x).sum()).backward()
    torch.testing.assert_close(x.grad, 2 * call.plain_grad(call.x))


def test_under_compile() -> None:
    """Dynamo does not trace the transforms of the operation: they run eagerly, with the same results and errors."""
    torch._dynamo.reset()
    layer = LMoELinear(5, 6, num_experts=3, rank=2, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 5, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    compiled = torch.compile(grad(loss), backend="aot_eager")(x)
    torch.testing.assert_close(compiled, grad(loss)(x))
    twice = torch.compile(grad(lambda x: grad(loss)(x).square().sum()), backend="aot_eager")
    with pytest.raises(RuntimeError, match="there are no second derivatives"):
        twice(x)
