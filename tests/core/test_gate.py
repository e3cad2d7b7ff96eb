"""The router logits as a function: the numbers that `lmoe` computes, their gradients, and when nothing is cast."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_kernels import lmoe, router_logits
from tests.problems import Case, leaves_of, make_problem

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
]


class Calls(TorchDispatchMode):
    """The names of the ATen functions that run within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("dtype", "of_gate"), DTYPES, ids=str)
def test_the_numbers_are_those_of_lmoe(dtype: torch.dtype, of_gate: torch.dtype, gate_bias: bool) -> None:
    problem = make_problem(Case(T=6, I=300, gate_bias=gate_bias), dtype, of_gate)
    leaves = leaves_of(problem.tensors)
    names = [name for name in ("x", "gate_weight", "gate_bias") if name in leaves]
    gate = {name: leaves[name] for name in names[1:]}
    experts = problem.tensors["lora_a"], problem.tensors["lora_b"]
    _, expected = lmoe(leaves["x"], *experts, **gate, return_router_logits=True, backend="torch")
    found = router_logits(leaves["x"].view(2, 3, -1), **gate)
    assert found.shape == (2, 3, problem.case.E)
    assert found.dtype == problem.dlogits.dtype
    assert torch.equal(found.view(expected.shape), expected)
    with torch.no_grad():
        assert torch.equal(router_logits(leaves["x"], **gate), expected)

    true = leaves_of({name: leaves[name] for name in names}, torch.float64)
    rounded = true["gate_weight"].detach().to(dtype).double().requires_grad_()
    exact = F.linear(true["x"], rounded, true.get("gate_bias"))
    dlogits = problem.dlogits
    grads = torch.autograd.grad(found, [leaves[name] for name in names], dlogits.view(found.shape))
    wanted = torch.autograd.grad(exact, [true["x"], rounded, *[true[name] for name in names[2:]]], dlogits.double())
    for name, grad, of_exact in zip(names, grads, wanted, strict=True):
        assert grad.dtype == leaves[name].dtype
        tolerance = 4 * torch.finfo(grad.dtype).eps * of_exact.abs().amax().item()
        torch.testing.assert_close(grad.double(), of_exact, rtol=0, atol=tolerance, msg=name)


def test_gradients_are_those_of_gradcheck() -> None:
    x, gate, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,)))
    assert torch.autograd.gradcheck(router_logits, (x, gate, bias))
    assert torch.autograd.gradgradcheck(router_logits, (x, gate, bias))


def test_transforms_and_torch_compile() -> None:
    x, gate = torch.randn(3, 7, 16), torch.randn(4, 16, requires_grad=True)
    expected = router_logits(x, gate)
    torch.testing.assert_close(torch.func.vmap(router_logits, (0, None))(x, gate), expected)
    torch.testing.assert_close(torch.func.jvp(lambda x: router_logits(x, gate.detach()), (x,), (x,))[1], expected)
    (dgate,) = torch.autograd.grad(expected.sin().sum(), gate)
    torch.testing.assert_close(torch.func.grad(lambda g: router_logits(x, g).sin().sum())(gate.detach()), dgate)
    compiled = torch.compile(router_logits, fullgraph=True, backend="aot_eager")
    (compiled_dgate,) = torch.autograd.grad(compiled(x, gate).sin().sum(), gate)
    torch.testing.assert_close(compiled_dgate, dgate)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, gate), expected)


def test_autocast_casts_x_and_not_the_result() -> None:
    x, gate = torch.randn(5, 64), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = router_logits(x, gate)
    assert torch.equal(found, router_logits(x.bfloat16(), gate))
    assert found.dtype == torch.float32
    assert not torch.equal(found, router_logits(x, gate))


def test_a_gate_that_is_fp32_like_x_is_not_cast() -> None:
    x, gate = torch.randn(5, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    expected, prepared, wide = router_logits(x, gate), gate.float(), x.float()
    with Calls() as calls:
        found = router_logits(wide, prepared)
    assert torch.equal(found, expected)
    assert not {"_to_copy", "copy_", "clone"}.intersection(calls.names)
    assert sum(name in ("mm", "addmm") for name in calls.names) == 1


@pytest.mark.parametrize("shape", [(0, 16), (16,), (1, 16), (2, 0, 16)], ids=str)
def test_any_number_of_tokens(shape: tuple[int, ...]) -> None:
    x, gate = torch.randn(shape).bfloat16(), torch.randn(4, 16)
    assert router_logits(x, gate).shape == router_logits(x, gate.requires_grad_()).shape == (*shape[:-1], 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have shape (..., I), got a tensor without dimensions"),
        ({"x": torch.zeros(2, 15)}, ValueError, "gate_weight must have shape (E, I) with E >= 1 and I = 15, got (4, 16)"),
        (
            {"gate_weight": torch.zeros(16)},
            ValueError,
            "gate_weight must have shape (E, I) with E >= 1 and I = 16, got (16,)",
        ),
        (
            {"gate_weight": torch.zeros(0, 16)},
            ValueError,
            "gate_weight must have shape (E, I) with E >= 1 and I = 16, got (0, 16)",
        ),
        (
            {"gate_weight": torch.zeros(4, 16).half()},
            TypeError,
            "gate_weight must have dtype torch.float32, got torch.float16",
        ),
        ({"gate_bias": torch.zeros(5)}, ValueError, "gate_bias must have shape (E) = (4,), got (5,)"),
    ],
)
def test_errors_of_one_line(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(2, 16), "gate_weight": torch.zeros(4, 16)} | changes
    with pytest.raises(error) as caught:
        router_logits(**arguments)
    assert str(caught.value) == f"router_logits: {message}"
