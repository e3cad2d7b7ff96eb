# SPDX-License-Identifier: Apache-2.0
# csrc/bindings.cpp: the parameters of csrc/params.h, filled in from tuples and tensors, and the launchers.

from torch import Tensor

from lmoe_kernels.options import Factors, Gradients, Options, Sizes

class ForwardParams:
    def __init__(self, dtype: int, sizes: Sizes, /) -> None: ...
    def set_problem(
        self,
        options: Options,
        factors: Factors,
        x: Tensor | None,
        base: Tensor | None,
        logits: Tensor | None,
        u: Tensor | None,
        y: Tensor | None,
        /,
    ) -> None: ...
    def set_one_pass(self, smem: int, /) -> None: ...
    def set_workspaces(self, v: Tensor, partial: Tensor, shrink_parts: int, expand_groups: int, /) -> None: ...

class BackwardParams(ForwardParams):
    def set_backward(
        self,
        dy: Tensor,
        dlogits_in: Tensor | None,
        du_dlogits: Tensor | None,
        x_splits: int,
        dy_splits: int,
        gradients: Gradients,
        /,
    ) -> None: ...

class DecodeParams(ForwardParams):
    def set_plan(self, partial: Tensor, blocks: int, chunk: int, chunks: int, column_tile: int, smem: int, /) -> None: ...

class DropoutParams:
    def __init__(
        self, dtype: int, shape: tuple[int, int], rows: Tensor, seed: Tensor, probability: float, out: Tensor, /
    ) -> None: ...

def forward(params: ForwardParams, device: int, stream: int) -> None: ...
def backward(params: BackwardParams, device: int, stream: int) -> None: ...
def decode(params: DecodeParams, device: int, stream: int) -> None: ...
def dropout(params: DropoutParams, device: int, stream: int) -> None: ...
def properties(device: int) -> tuple[int, int, bool]: ...
