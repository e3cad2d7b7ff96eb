"""What csrc/bindings.cpp reads from the tuples of options.py, and refuses."""

from types import ModuleType
from typing import Any

import pytest
import torch

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.options import Factors, Gradients, Options
from tests.problems import Case, make_problem
from tests.tensors import off_by_a_byte
from tools.emulator.launches import recorded

OPTIONS = Options()


def test_tuples_that_the_bindings_do_not_know_are_refused(emulated_cuda: ModuleType) -> None:
    """A field that only options.py has, or only csrc/bindings.cpp, must not shift the others."""
    t = make_problem(Case(), torch.float32).tensors
    factors = Factors(t["lora_a"], t["lora_b"], t["gate_weight"])
    sizes = factors.sizes(7)

    def set_problem(sizes: Any = sizes, options: Any = OPTIONS, factors: Any = factors) -> None:
        params = emulated_cuda.ForwardParams(extension.DTYPES[torch.float32], sizes)
        params.set_problem(options, factors, t["x"], None, None, None, None)

    set_problem()
    with pytest.raises(TypeError, match="lmoe: Sizes must have 6 fields, got 7"):
        set_problem(sizes=(*sizes, 1))
    with pytest.raises(TypeError, match="lmoe: Options must have 6 fields, got 3"):
        set_problem(options=OPTIONS[:3])
    with pytest.raises(TypeError, match="lmoe: Factors must have 5 fields, got 6"):
        set_problem(factors=(*factors, None))
    for mixing in ("mean", None):
        with pytest.raises(ValueError, match=f"lmoe: mixing must be one of factors, outputs, got {mixing!r}"):
            set_problem(options=OPTIONS._replace(mixing=mixing))
    with pytest.raises(AttributeError, match="data_ptr"):
        set_problem(factors=factors._replace(lora_a=1.0))


NAMES = {  # of the tensors of a backward, and how the error calls them
    **{name: name for name in ("x", "lora_a", "lora_b", "gate_weight", "gate_bias", "logits", "u", "y")},
    **{name: name for name in ("v", "partial", "dy", "dlogits_in", "du_dlogits")},
    **{f"d{name}": f"the gradient of {name}" for name in ("x", "lora_a", "lora_b", "gate_weight", "logits")},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_address_between_two_elements_is_refused(name: str, emulated_cuda: ModuleType) -> None:
    """Outputs and workspaces included: one error names the tensor, and no kernel runs."""
    case = Case(T=3, E=2, R=8, gate_bias=True)
    given = make_problem(case, torch.bfloat16).tensors
    rows = {"u": (3, 2, 8), "y": (3, 41), "v": (3, 16), "dy": (3, 41), "du_dlogits": (3, 24)}
    in_fp32 = {"logits": (3, 2), "partial": (600,), "dlogits_in": (3, 2)}
    t = given | {key: torch.zeros(shape).bfloat16() for key, shape in rows.items()}
    t |= {key: torch.zeros(shape) for key, shape in in_fp32.items()}
    t |= {f"d{key}": torch.zeros_like(t[key]) for key in ("x", "lora_a", "lora_b", "gate_weight", "logits")}

    def run(t: dict[str, torch.Tensor]) -> None:
        factors = Factors(t["lora_a"], t["lora_b"], t["gate_weight"], t["gate_bias"])
        params = emulated_cuda.BackwardParams(extension.DTYPES[torch.bfloat16], factors.sizes(3))
        params.set_problem(OPTIONS, factors, t["x"], None, t["logits"], t["u"], t["y"])
        params.set_workspaces(t["v"], t["partial"], 1, 1)
        gradients = Gradients(t["dx"], t["dlora_a"], t["dlora_b"], t["dgate_weight"], gate_logits=t["dlogits"])
        params.set_backward(t["dy"], t["dlogits_in"], t["du_dlogits"], 1, 1, gradients)
        emulated_cuda.backward(params, 0, 0)

    run(t)
    with recorded(emulated_cuda) as calls, pytest.raises(ValueError, match=f"lmoe: {NAMES[name]} must lie on a multiple of"):
        run(t | {name: off_by_a_byte(t[name])})
    assert calls.launches == []
