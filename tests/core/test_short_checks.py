"""The one look that the usual call gets accepts nothing that the checks one by one refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from lmoe_kernels import checks, lmoe, lmoe_linear
from lmoe_kernels.options import Factors
from tests.problems import good_arguments

WRONG: dict[str, Callable[[], dict[str, Any]]] = {
    "x is a list": lambda: {"x": [1.0]},
    "x is an array": lambda: {"x": torch.randn(2, 16).numpy()},
    "x has no dims": lambda: {"x": torch.tensor(1.0)},
    "x is sparse": lambda: {"x": torch.randn(2, 16).to_sparse()},
    "x is compressed": lambda: {"x": torch.randn(2, 16).to_sparse_csr()},
    "x is nested": lambda: {"x": torch.nested.nested_tensor([torch.randn(2, 16)])},
    "x is int": lambda: {"x": torch.ones(2, 16, dtype=torch.int64)},
    "x is complex": lambda: {"x": torch.ones(2, 16, dtype=torch.complex64)},
    "x is int and so are the factors": lambda: {
        name: torch.ones(shape, dtype=torch.int64)
        for name, shape in {"x": (2, 16), "lora_a": (8, 4, 16), "lora_b": (8, 4, 12), "gate_weight": (8, 16)}.items()
    },
    "x has other features": lambda: {"x": torch.randn(2, 15)},
    "x is on another device": lambda: {"x": torch.randn(2, 16, device="meta")},
    "a is no tensor": lambda: {"lora_a": 3.0},
    "a is sparse": lambda: {"lora_a": torch.randn(8, 4, 16).to_sparse()},
    "a is nested": lambda: {"lora_a": torch.nested.nested_tensor([torch.randn(4, 16)] * 8)},
    "a is half": lambda: {"lora_a": torch.randn(8, 4, 16).half()},
    "a is wider": lambda: {"lora_a": torch.randn(8, 4, 16).double()},
    "a is on another device": lambda: {"lora_a": torch.randn(8, 4, 16, device="meta")},
    "a has two dims": lambda: {"lora_a": torch.randn(4, 16)},
    "a has other experts": lambda: {"lora_a": torch.randn(7, 4, 16)},
    "a has another rank": lambda: {"lora_a": torch.randn(8, 3, 16)},
    "shared a has another rank": lambda: {"lora_a": torch.randn(1, 3, 16)},
    "a has other features": lambda: {"lora_a": torch.randn(8, 4, 15)},
    "b is no tensor": lambda: {"lora_b": None},
    "b is sparse": lambda: {"lora_b": torch.randn(8, 4, 12).to_sparse()},
    "b is bf16": lambda: {"lora_b": torch.randn(8, 4, 12).bfloat16()},
    "b is on another device": lambda: {"lora_b": torch.randn(8, 4, 12, device="meta")},
    "b has two dims": lambda: {"lora_b": torch.randn(8, 4)},
    "b has four dims": lambda: {"lora_b": torch.randn(8, 4, 12, 1)},
    "no experts": lambda: {
        "lora_a": torch.randn(1, 4, 16),
        "lora_b": torch.randn(0, 4, 12),
        "gate_weight": torch.randn(0, 16),
    },
    "no ranks": lambda: {"lora_a": torch.randn(8, 0, 16), "lora_b": torch.randn(8, 0, 12)},
    "no gate": lambda: {"gate_weight": None},
    "gate is no tensor": lambda: {"gate_weight": "gate"},
    "gate is sparse": lambda: {"gate_weight": torch.randn(8, 16).to_sparse()},
    "gate is int": lambda: {"gate_weight": torch.ones(8, 16, dtype=torch.int32)},
    "gate is on another device": lambda: {"gate_weight": torch.randn(8, 16, device="meta")},
    "gate has other experts": lambda: {"gate_weight": torch.randn(7, 16)},
    "gate has other features": lambda: {"gate_weight": torch.randn(8, 15)},
    "gate has three dims": lambda: {"gate_weight": torch.randn(8, 16, 1)},
    "two gates": lambda: {"gate_logits": torch.randn(2, 8)},
    "bias does not fit": lambda: {"gate_bias": torch.randn(7)},
}


def _split(arguments: dict[str, Any]) -> tuple[Any, Factors]:
    return arguments["x"], Factors(**{name: t for name, t in arguments.items() if name != "x"})


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
def test_what_is_wrong_is_never_waved_through(changes: Callable[[], dict[str, Any]]) -> None:
    arguments = good_arguments(**changes())
    x, factors = _split(arguments)
    assert not checks._fits(x, factors)
    with pytest.raises((TypeError, ValueError)) as expected:
        checks._check_factors("lmoe", x, factors)
    with pytest.raises(expected.type) as caught:
        lmoe(**arguments)
    assert str(caught.value) == str(expected.value)


RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {},
    "parameters": lambda: {"lora_a": torch.nn.Parameter(torch.randn(8, 4, 16))},
    "shared a": lambda: {"lora_a": torch.randn(1, 4, 16)},
    "half x": lambda: {"x": torch.randn(2, 16).bfloat16()},
    "half factors": lambda: {name: t.half() for name, t in good_arguments().items()},
    "fp64 x": lambda: {"x": torch.randn(2, 16).double()},
    "more dims": lambda: {"x": torch.randn(2, 3, 5, 16)},
    "one token": lambda: {"x": torch.randn(16)},
    "no tokens": lambda: {"x": torch.randn(0, 16)},
}


@pytest.mark.parametrize("changes", RIGHT.values(), ids=RIGHT)
def test_the_usual_calls_need_one_look(changes: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def spelled_out(*args: object) -> None:
        raise AssertionError("checked one by one")

    arguments = good_arguments(**changes())
    checks._check_factors("lmoe", *_split(arguments))
    monkeypatch.setattr(checks, "_check_factors", spelled_out)
    lmoe(**arguments)


def test_a_subclass_is_checked_one_by_one() -> None:
    x = torch.randn(2, 16)
    arguments = good_arguments(x=TwoTensor(x, x.clone()))
    assert not checks._fits(*_split(arguments))
    assert lmoe(**arguments).shape == (2, 12)


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        (torch.randn(12, 16).numpy(), TypeError, "weight must be a torch.Tensor, got ndarray"),
        (torch.randn(12, 16).to_sparse(), TypeError, "weight must be a dense tensor, got one of layout torch.sparse_coo"),
        (torch.randn(12, 16).half(), TypeError, "weight must have dtype torch.float32 like x, got torch.float16"),
        (torch.randn(12, 16, device="meta"), ValueError, "weight must be on cpu like x, got meta"),
        (torch.randn(16, 12), ValueError, "weight must have shape (O, I) = (12, 16), got (16, 12)"),
        (torch.randn(12), ValueError, "weight must have shape (O, I) = (12, 16), got (12,)"),
    ],
    ids=["array", "sparse", "half", "device", "transposed", "one dim"],
)
def test_a_wrong_weight(weight: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        lmoe_linear(**good_arguments(weight=weight, bias=None))
    assert str(caught.value) == f"lmoe_linear: {text}"


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -float("inf")])
def test_scaling_is_finite(scaling: float) -> None:
    with pytest.raises(ValueError, match=f"^lmoe: scaling must be a finite number, got {scaling}$"):
        lmoe(**good_arguments(scaling=scaling))
