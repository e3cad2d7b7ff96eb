"""`warmup` where there is nothing to compile, and its bad input. `tests/triton/test_warmup.py` compiles."""

import subprocess
from typing import Any

import pytest
import torch
from torch import nn

from lmoe_kernels import LMoELinear, compilation, use_backend, warmup


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), LMoELinear(8, 12, num_experts=2, rank=2))


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)


def test_nothing_is_compiled_on_a_cpu(model: nn.Module) -> None:
    assert warmup(model, tokens=[1, 64]) == 0
    assert warmup(model, tokens=range(1, 9), dtype=torch.bfloat16, backward=False, processes=3) == 0
    with use_backend("reference"):
        assert warmup(model, tokens=5) == 0


def test_nothing_is_compiled_where_triton_interprets(model: nn.Module) -> None:
    pytest.importorskip("triton")
    with use_backend("triton"):
        assert warmup(model, tokens=5) == 0


def test_a_layer_whose_backend_cannot_run_is_an_error(model: nn.Module) -> None:
    model[1].backend = "cuda"
    with pytest.raises(ValueError, match=r"^warmup: backend must be one that can take this call, got 'cuda': "):
        warmup(model, tokens=5)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"model": "m"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model must have L-MoE layers, got none"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"tokens": [16, -1]}, ValueError, "tokens must be at least 1, got -1"),
        ({"tokens": []}, ValueError, "tokens must be at least one number, got none"),
        ({"tokens": True}, TypeError, "tokens must be an int, got bool"),
        ({"tokens": 2.0}, TypeError, "tokens must be an int or several, got float"),
        ({"tokens": [2.0]}, TypeError, "tokens must be an int, got float"),
        ({"dtype": "bf16"}, TypeError, "dtype must be None or one of {dtypes}, got bf16"),
        ({"dtype": torch.int8}, TypeError, "dtype must be None or one of {dtypes}, got torch.int8"),
        ({"backward": 1}, TypeError, "backward must be a bool, got int"),
        ({"processes": 0}, ValueError, "processes must be at least 1, got 0"),
        ({"processes": 1.5}, TypeError, "processes must be an int, got float"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], text: str, model: nn.Module) -> None:
    with pytest.raises(error) as caught:
        warmup(**{"model": model, "tokens": 5} | arguments)
    dtypes = "torch.float32, torch.bfloat16, torch.float16, torch.float64"
    assert str(caught.value) == f"warmup: {text.format(dtypes=dtypes)}"


def test_the_numbers_that_are_looked_at() -> None:
    """All up to one tile of 64 tokens, then the first and the last of each tile."""
    assert compilation._thinned(range(1, 66)) == [*range(1, 66)]
    assert compilation._thinned([200, 70, 128, 65, 129, 100, 200]) == [200, 65, 128, 129]
    assert compilation._thinned([5, 5, 300]) == [5, 300]


def test_parameters_that_do_not_fit_the_activations() -> None:
    layer = LMoELinear.from_linear(nn.Linear(8, 8), torch.float16, num_experts=2, rank=2)
    with pytest.raises(TypeError) as caught:
        warmup(nn.Sequential(layer), tokens=5, dtype=torch.bfloat16)
    must = "have dtype torch.bfloat16 like the activations, or torch.float32"
    assert str(caught.value) == f"warmup: 0.lora_a must {must}, got torch.float16"


def test_a_quantised_layer_needs_the_dtype_of_its_activations() -> None:
    layer = LMoELinear(8, 8, num_experts=2, rank=2)
    layer.frozen_layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError) as caught:
        warmup(nn.ModuleDict({"proj": layer}), tokens=5)
    must = "be given for layers whose weight does not have the dtype of their activations"
    assert str(caught.value) == f"warmup: dtype must {must}, got None for 'proj' with a weight of torch.uint8"
    assert warmup(layer, tokens=5, dtype=torch.bfloat16) == 0
