"""The rows of the tables: the same layer, as the frozen linear alone, as what people use today, and as we compute it.

A row builds a `Step` from the inputs: a function of no arguments that runs the layer forward, and the leaves whose gradients
its backward computes. What each row should compute is its definition, in `checks.py`; no row is timed before it agrees.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.shapes import DTYPES, SCALING, Inputs, Shape
from lmoe_kernels import lmoe, lmoe_linear
from lmoe_kernels.dispatch import BACKENDS, Backend, Problem


class Leaf(NamedTuple):
    """A tensor that wants a gradient, and where in the inputs' gradients the definition finds the same one."""

    tensor: Tensor
    name: str  # a field of `Inputs`
    expert: int | None = None  # None: all experts
    transposed: bool = False


class Step(NamedTuple):
    """One row, ready to run on its inputs."""

    forward: Callable[[], Tensor]  # to y (T, O)
    leaves: tuple[Leaf, ...]


class NotRun(Exception):  # noqa: N818 - it is no error: the table shows the reason
    """Why a row cannot be measured here."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    says: str
    definition: str
    build: Callable[[Inputs, str], Step]  # inputs and scope
    scopes: tuple[str, ...] = ("layer",)
    why_not: Callable[[Shape, torch.device], str | None] = lambda shape, device: None
    wide_tokens: int = 4  # how many (T, I + O) tensors the row holds at its peak, about: for the check of the memory
    compiled: bool = False


def leaf(inputs: Inputs, name: str, expert: int | None = None, dtype: torch.dtype | None = None) -> Leaf:
    """A view of an input that requires a gradient, or a copy in another dtype."""
    tensor = getattr(inputs, name) if expert is None else getattr(inputs, name)[expert]
    return Leaf(tensor.detach().to(dtype or tensor.dtype).requires_grad_(), name, expert)


def frozen(inputs: Inputs, scope: str) -> Step:
    """The linear layer that all rows stand on, and the yardstick of the delta alone. Its backward is dx alone."""
    x = leaf(inputs, "x")
    return Step(lambda: F.linear(x.tensor, inputs.weight), (x,))


def unsloth(inputs: Inputs, scope: str) -> Step:
    """One LoRA in unsloth's order of operations, restated; the adapter is expert 0."""
    leaves = leaf(inputs, "x"), leaf(inputs, "lora_a", 0), leaf(inputs, "lora_b", 0)
    x, a, b = (tensor for tensor, *_ in leaves)
    return Step(lambda: _InPlaceLora.apply(x, inputs.weight, a, b), leaves)  # pyright: ignore[reportReturnType]


class _InPlaceLora(torch.autograd.Function):
    """Adds the expand product into the frozen one in place, and saves x alone: the backward shrinks x and dy once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        return F.linear(x, weight).addmm_(x @ a.t(), b, alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight, a, b) = grads, ctx.saved_tensors
        da = torch.empty_like(a).addmm_((dy @ b.t()).t(), x, alpha=SCALING, beta=0)
        db = torch.empty_like(b).addmm_((x @ a.t()).t(), dy, alpha=SCALING, beta=0)
        dx = (dy @ weight).addmm_(dy @ b.t(), a, alpha=SCALING)
        return dx, None, da, db


def loop(inputs: Inputs, scope: str) -> Step:
    """Every expert in turn, its output scaled by its gate and added: what LoRAMoE, HydraLoRA and MoLE share.

    The experts' factors are parameters of their own, as there.
    """
    experts = range(inputs.shape.num_experts)
    factors = [leaf(inputs, name, e) for name in ("lora_a", "lora_b") for e in experts]
    leaves = leaf(inputs, "x"), leaf(inputs, "gate_weight"), *factors
    x, gate_weight, *tensors = (tensor for tensor, *_ in leaves)
    lora_a, lora_b = tensors[: len(experts)], tensors[len(experts) :]

    def forward() -> Tensor:
        gates = F.linear(x, gate_weight).softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        y = F.linear(x, inputs.weight)
        for e in experts:
            y = y + (F.linear(x, lora_a[e]) @ lora_b[e]) * SCALING * gates[:, e : e + 1]
        return y

    return Step(forward, leaves)


def eager(inputs: Inputs, scope: str, compiled: bool = False) -> Step:
    """The factored form as ten lines of PyTorch, differentiated by autograd."""
    leaves = tuple(leaf(inputs, name) for name in ("x", "lora_a", "lora_b", "gate_weight"))
    weight = inputs.weight if scope == "layer" else None
    function = _compile(factored) if compiled else factored
    return Step(lambda: function(leaves[0].tensor, weight, *(tensor for tensor, *_ in leaves[1:])), leaves)


def factored(x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor) -> Tensor:
    """Project onto all experts, blend, project back: no per-token factor is built."""
    gates = F.linear(x, gate_weight).softmax(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    u = F.linear(x, lora_a.flatten(0, 1)).unflatten(1, lora_a.shape[:2])  # [T, I] @ [I, E R] -> [T, E, R]
    h = (gates[:, :, None] * u).sum(dim=1, keepdim=True)
    v = gates[:, :, None] * h
    delta = SCALING * (v.flatten(1) @ lora_b.flatten(0, 1))  # [T, E R] @ [E R, O] -> [T, O]
    return delta if weight is None else F.linear(x, weight) + delta


def literal(inputs: Inputs, scope: str) -> Step:
    """The definition as the paper writes it, every token's own A and B built, differentiated by autograd."""
    leaves = tuple(leaf(inputs, name) for name in ("x", "lora_a", "lora_b", "gate_weight"))
    x, *parameters = (tensor for tensor, *_ in leaves)

    def forward() -> Tensor:
        delta = per_token(x, *parameters)
        return delta if scope == "delta" else F.linear(x, inputs.weight) + delta

    return Step(forward, leaves)


def per_token(x: Tensor, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor) -> Tensor:
    """L-MoE's delta by its definition; `lmoe_kernels.reference` without what it would build of size T I O."""
    gates = F.linear(x, gate_weight).softmax(dim=-1)
    a_of_token = torch.einsum("te,eri->tri", gates, lora_a)
    b_of_token = torch.einsum("te,ero->tro", gates, lora_b)
    return SCALING * torch.einsum("tro,tr->to", b_of_token, torch.einsum("tri,ti->tr", a_of_token, x))


def ours(backend: str, inputs: Inputs, scope: str, dtype: torch.dtype | None = None) -> Step:
    """The package itself, by one of its backends; experts and gate in `dtype`, None for that of the activations."""
    parameters = (leaf(inputs, name, dtype=dtype) for name in ("lora_a", "lora_b", "gate_weight"))
    leaves = leaf(inputs, "x"), *parameters
    x, lora_a, lora_b, gate_weight = (tensor for tensor, *_ in leaves)
    options: dict[str, Any] = {"gate_weight": gate_weight, "scaling": SCALING, "backend": backend}
    call: Any = (
        partial(lmoe, x, lora_a, lora_b, **options)
        if scope == "delta"
        else partial(lmoe_linear, x, inputs.weight, None, lora_a, lora_b, **options)
    )
    return Step(call, leaves)


def _compile(function: Callable) -> Callable:
    """torch.compile with fixed shapes; a retained graph must stay usable, so no buffer is donated to the backward."""
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


def _peer(name: str) -> Callable[[Inputs, str], Step]:
    """A row of `peers.py`, which imports PEFT when it is built and not before."""

    def build(inputs: Inputs, scope: str) -> Step:
        try:
            from benchmarks import peers
        except ImportError as error:
            raise NotRun(f"not installed: pip install peft ({error})") from None
        return getattr(peers, name)(inputs)

    return build


def _same_in_fp32(shape: Shape, device: torch.device) -> str | None:
    return "the same as peft in float32" if DTYPES[shape.dtype] == torch.float32 else None


def _one_alone(shape: Shape, device: torch.device) -> str | None:
    return "the same as peft with one adapter" if shape.num_experts == 1 else None


def _large_factors(shape: Shape, device: torch.device) -> str | None:
    size = 4 * shape.tokens * shape.rank * (shape.in_features + shape.out_features)
    largest = 64
    return (
        f"its factors A(t), B(t) take {size / 2**20:.0f} MiB, {largest} at most are run" if size > largest * 2**20 else None
    )


def why_not_timed(backend: Backend, problem: Problem) -> str | None:
    """Why a backend is not worth a time: it cannot, or on a CPU it only interprets or emulates its kernels."""
    return backend.why_not(problem) or (backend.why_not_unasked(problem) if problem.device.type == "cpu" else None)


def _backend_rows(backend: Backend) -> tuple[Row, Row]:
    """Experts in the activations' dtype, and in fp32 as `LMoELinear` has them."""
    says = f"ours, backend {backend.name}"
    both = ("layer", "delta")

    def why_not(shape: Shape, device: torch.device) -> str | None:
        return why_not_timed(backend, shape.problem(device))

    def why_not_fp32(shape: Shape, device: torch.device) -> str | None:
        same = f"the same as {backend.name} in float32" if DTYPES[shape.dtype] == torch.float32 else None
        return why_not(shape, device) or same

    in_fp32 = partial(ours, backend.name, dtype=torch.float32)
    return (
        Row(backend.name, says, "factors", partial(ours, backend.name), both, why_not),
        Row(f"{backend.name}-fp32", f"{says}, fp32 experts (the default)", "factors", in_fp32, both, why_not_fp32),
    )


def rows() -> Mapping[str, Row]:
    """Every row by name: baselines, peers, and the package's backends as they are registered now."""
    both = ("layer", "delta")
    table = [
        Row("frozen", "the frozen linear", "frozen", frozen, both, wide_tokens=2),
        Row("peft", "PEFT, one LoRA", "one", _peer("one")),
        Row("peft-fp32", "PEFT, one LoRA in fp32 (its default)", "one", _peer("one_fp32"), ("layer",), _same_in_fp32, 8),
        Row("peft-compiled", "PEFT, one LoRA, torch.compile", "one", _peer("one_compiled"), compiled=True),
        Row("unsloth", "one LoRA in unsloth's order", "one", unsloth),
        Row("peft-all", "PEFT, E active LoRAs", "sum", _peer("all_active"), why_not=_one_alone, wide_tokens=24),
        Row("xlora", "X-LoRA's layer (PEFT), E LoRAs", "scaled", _peer("xlora"), wide_tokens=40),
        Row("loop", "LoRAMoE, HydraLoRA, MoLE: loop over E", "outputs", loop, wide_tokens=40),
        Row("literal", "L-MoE by its definition", "factors", literal, both, _large_factors),
        Row("eager", "L-MoE, factored, eager PyTorch", "factors", eager, both, wide_tokens=6),
        Row(
            "eager-compiled", "L-MoE, factored, torch.compile", "factors", partial(eager, compiled=True), both,
            wide_tokens=6, compiled=True,
        ),
    ]  # fmt: skip
    table += [row for backend in BACKENDS.values() if backend.name != "reference" for row in _backend_rows(backend)]
    return {row.name: row for row in table}


def bytes_needed(row: Row, shape: Shape) -> int:
    """About what a row holds at its peak beyond the inputs, its adapters and their gradients included."""
    features, experts = shape.in_features + shape.out_features, shape.num_experts
    wide = row.wide_tokens * shape.tokens * features * shape.itemsize
    adapters = 2 * experts * (shape.rank * features + shape.in_features) * 4
    if row.name == "literal":  # A(t) and B(t) in fp32, with their gradients
        wide += 4 * shape.tokens * shape.rank * features * 4
    return wide + adapters
