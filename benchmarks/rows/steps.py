"""What a row is: a function that builds a step from inputs, and what the step differentiates with respect to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.rows.shapes import Inputs, Shape


class GradInput(NamedTuple):
    """A tensor whose gradient a step computes, and where the definition's gradients hold the same one."""

    tensor: Tensor
    name: str  # a field of `Inputs`
    expert: int | None = None  # None: all experts
    transposed: bool = False


class Step(NamedTuple):
    """One row, ready to run on its inputs."""

    forward: Callable[[], Tensor]  # to y (T, O)
    grad_inputs: tuple[GradInput, ...]


class NotRun(Exception):  # noqa: N818 - not an error: the table shows the reason
    """Why a row cannot be measured here."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    label: str  # what the tables and pictures call it
    definition: str  # a key of `checks.DEFINITIONS`
    build: Callable[[Inputs, str], Step]  # inputs and scope
    scopes: tuple[str, ...] = ("layer",)
    why_not: Callable[[Shape, torch.device], str | None] = lambda shape, device: None
    wide_tokens: int = 4  # about how many (T, I + O) tensors the row holds at its peak: for the check of the memory
    compiled: bool = False


def grad_input(inputs: Inputs, name: str, expert: int | None = None, dtype: torch.dtype | None = None) -> GradInput:
    """A view of an input that requires a gradient, or a copy in another dtype."""
    tensor = getattr(inputs, name) if expert is None else getattr(inputs, name)[expert]
    return GradInput(tensor.detach().to(dtype or tensor.dtype).requires_grad_(), name, expert)


def compile_fixed(function: Callable) -> Callable:
    """torch.compile with fixed shapes; no buffer is donated to the backward, because a retained graph must stay usable."""
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)
