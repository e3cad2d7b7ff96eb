"""What the `torch` backend costs on the same chip: its ATen operations are counted, their times follow from bytes and FLOPs.

The backend is called on fake CUDA tensors, which need no GPU, so the operations are those of a GPU. The model is kind to it:
each matrix product reads its operands from memory once, whatever cuBLAS does with so narrow ones, small tensors stay in the
L2, and copies inside of an operation are not counted.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.model.chips import CUBLAS_OF_A_COPY, CUBLAS_OF_A_GEMM, ELEMENTWISE, FILL_AND_DRAIN, Chip
from benchmarks.rows.shapes import DTYPES, SCALING, Shape
from lmoe_kernels.options import Factors, Options
from tools import calls

PRODUCTS = ("mm", "addmm", "addmm_")
NARROW = 256  # a product with a side of no more is bound by bytes: cuBLAS's narrow ones


class Operation(NamedTuple):
    """An ATen operation that launches a kernel."""

    name: str
    bytes: int  # of its operands and results
    flops: int
    narrow: bool

    def seconds(self, chip: Chip) -> float:
        """Its modelled time."""
        rate = chip.l2 if self.bytes < chip.kept else chip.memory
        if self.name not in PRODUCTS:
            return max(self.bytes / rate, ELEMENTWISE)
        share = CUBLAS_OF_A_COPY if self.narrow else 1.0
        through_memory, multiplied = self.bytes / (chip.memory * share), self.flops / (chip.gemm * CUBLAS_OF_A_GEMM)
        return max(through_memory, multiplied) + FILL_AND_DRAIN


class _Recorder(TorchDispatchMode):
    """Records the operations that run a kernel: not the views, and not those that only ask for a property."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation, and record it."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        reads, writes = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in (args, result))
        if views or not writes or name.startswith(("prim::", "empty", "new_empty")):
            return result
        moved = sum(t.numel() * t.element_size() for t in (*reads, *writes))
        flops, narrow = 0, False
        if name in PRODUCTS:
            left, right = reads[-2:]
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            narrow = min(*left.shape, *right.shape) <= NARROW
        self.found.append(Operation(name, moved, flops, narrow))
        return result


@cache
def operations(shape: Shape) -> tuple[list[Operation], list[Operation]]:
    """What a forward with saving and a backward launch."""
    T, I, O, E, R, _ = shape.sizes  # noqa: E741
    with FakeTensorMode():

        def make(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=DTYPES[shape.dtype], device="cuda")

        x, dy, options = make(T, I), make(T, O), Options(scaling=SCALING)
        factors = Factors(make(E, R, I), make(E, R, O), gate_weight=make(E, I))
        with _Recorder() as forward:
            _, saved = calls.forward_saved("torch", x, factors, options)
        with _Recorder() as backward:
            calls.backward("torch", dy, x, factors, saved, options)
    return forward.found, backward.found
