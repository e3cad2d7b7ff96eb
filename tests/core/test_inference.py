"""With gradients disabled nothing is saved for a backward."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_kernels import lmoe, ops
from lmoe_kernels.options import Saved
from tests.problems import Case, leaves_of, make_problem


class _Results(TorchDispatchMode):
    """Records what calls of the op `forward` return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is ops.forward:
            self.seen.append(result)
        return result


@pytest.mark.parametrize("without", [torch.no_grad(), torch.inference_mode()], ids=["no_grad", "inference_mode"])
def test_nothing_is_saved_if_gradients_are_disabled(without: AbstractContextManager, backend: str) -> None:
    leaves = leaves_of(make_problem(Case(), torch.float32).tensors)
    arguments = leaves["x"], leaves["lora_a"], leaves["lora_b"]
    with without, _Results() as results:
        y = lmoe(*arguments, gate_weight=leaves["gate_weight"], backend=backend)
    assert not y.requires_grad
    (saved,) = results.seen
    assert saved[0].shape == y.shape
    assert saved[1:] == (None,) * len(Saved._fields)
