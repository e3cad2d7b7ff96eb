"""What csrc/bindings.cpp reads from the tuples of options.py, and refuses."""

from types import ModuleType
from typing import Any

import pytest
import torch

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.options import Factors, Options
from tests.problems import Case, make_problem

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
    with pytest.raises(TypeError, match="lmoe: Options must have at least 4 fields, got 3"):
        set_problem(options=OPTIONS[:3])
    with pytest.raises(TypeError, match="lmoe: Factors must have 5 fields, got 6"):
        set_problem(factors=(*factors, None))
    for mixing in ("mean", None):
        with pytest.raises(ValueError, match=f"lmoe: mixing must be one of factors, outputs, got {mixing!r}"):
            set_problem(options=OPTIONS._replace(mixing=mixing))
    with pytest.raises(AttributeError, match="data_ptr"):
        set_problem(factors=factors._replace(lora_a=1.0))
