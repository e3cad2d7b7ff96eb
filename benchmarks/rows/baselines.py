"""The rows that need no other package: the frozen linear alone, LoRA as it is run today, and L-MoE written in three forms.

What each row must compute is its definition, in `checks.py`; no row is timed before it agrees.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows.shapes import SCALING, Inputs
from benchmarks.rows.steps import Step, compile_fixed, grad_input
from lmoe_kernels import lmoe, lmoe_linear


def frozen(inputs: Inputs, scope: str) -> Step:
    """The linear layer under all other rows; what the delta alone is compared with too. Its backward computes dx alone."""
    x = grad_input(inputs, "x")
    return Step(lambda: F.linear(x.tensor, inputs.weight), (x,))


def unsloth(inputs: Inputs, scope: str) -> Step:
    """One LoRA in unsloth's order of operations, written anew; the adapter is expert 0."""
    grad_inputs = grad_input(inputs, "x"), grad_input(inputs, "lora_a", 0), grad_input(inputs, "lora_b", 0)
    x, a, b = (tensor for tensor, *_ in grad_inputs)
    return Step(lambda: _InPlaceLora.apply(x, inputs.weight, a, b), grad_inputs)  # pyright: ignore[reportReturnType]


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
    """One expert after the other, its output scaled by its gate and added: what LoRAMoE, HydraLoRA and MoLE have in common.

    The experts' factors are separate parameters, as they are there.
    """
    experts = range(inputs.shape.num_experts)
    factors = [grad_input(inputs, name, e) for name in ("lora_a", "lora_b") for e in experts]
    grad_inputs = grad_input(inputs, "x"), grad_input(inputs, "gate_weight"), *factors
    x, gate_weight, *tensors = (tensor for tensor, *_ in grad_inputs)
    lora_a, lora_b = tensors[: len(experts)], tensors[len(experts) :]

    def forward() -> Tensor:
        gates = F.linear(x, gate_weight).softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        y = F.linear(x, inputs.weight)
        for e in experts:
            y = y + (F.linear(x, lora_a[e]) @ lora_b[e]) * SCALING * gates[:, e : e + 1]
        return y

    return Step(forward, grad_inputs)


def eager(inputs: Inputs, scope: str, compiled: bool = False) -> Step:
    """The factored form as ten lines of PyTorch, differentiated by autograd."""
    grad_inputs = tuple(grad_input(inputs, name) for name in ("x", "lora_a", "lora_b", "gate_weight"))
    weight = inputs.weight if scope == "layer" else None
    function = compile_fixed(ten_lines) if compiled else ten_lines
    return Step(lambda: function(grad_inputs[0].tensor, weight, *(tensor for tensor, *_ in grad_inputs[1:])), grad_inputs)


def ten_lines(x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor) -> Tensor:
    """Project onto all experts, blend, project back: no per-token factor is built.

    This is what a user writes for one layer. `tools.factored` is the same function with all options of the package; its
    choice of experts and its casts are operations that a layer without `top_k` does not need, and here they would be timed.
    """
    gates = F.linear(x, gate_weight).softmax(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    u = F.linear(x, lora_a.flatten(0, 1)).unflatten(1, lora_a.shape[:2])  # [T, I] @ [I, E R] -> [T, E, R]
    h = (gates[:, :, None] * u).sum(dim=1, keepdim=True)
    v = gates[:, :, None] * h
    delta = SCALING * (v.flatten(1) @ lora_b.flatten(0, 1))  # [T, E R] @ [E R, O] -> [T, O]
    return delta if weight is None else F.linear(x, weight) + delta


def literal(inputs: Inputs, scope: str) -> Step:
    """The definition as the paper writes it, every token's own A and B built, differentiated by autograd."""
    grad_inputs = tuple(grad_input(inputs, name) for name in ("x", "lora_a", "lora_b", "gate_weight"))
    x, *parameters = (tensor for tensor, *_ in grad_inputs)

    def forward() -> Tensor:
        delta = per_token(x, *parameters)
        return delta if scope == "delta" else F.linear(x, inputs.weight) + delta

    return Step(forward, grad_inputs)


def per_token(x: Tensor, lora_a: Tensor, lora_b: Tensor, gate_weight: Tensor) -> Tensor:
    """L-MoE's delta by its definition.

    `reference.forward` multiplies the averaged factors first, which takes T I O numbers: at these sizes more than the
    memory holds. Here A(t) is applied to x before B(t); a test compares the two.
    """
    gates = F.linear(x, gate_weight).softmax(dim=-1)
    a_of_token = torch.einsum("te,eri->tri", gates, lora_a)
    b_of_token = torch.einsum("te,ero->tro", gates, lora_b)
    return SCALING * torch.einsum("tro,tr->to", b_of_token, torch.einsum("tri,ti->tr", a_of_token, x))


def ours(backend: str, inputs: Inputs, scope: str, dtype: torch.dtype | None = None) -> Step:
    """The package itself, by one of its backends; experts and gate in `dtype`, None for that of the activations."""
    parameters = (grad_input(inputs, name, dtype=dtype) for name in ("lora_a", "lora_b", "gate_weight"))
    grad_inputs = grad_input(inputs, "x"), *parameters
    x, lora_a, lora_b, gate_weight = (tensor for tensor, *_ in grad_inputs)
    options: dict[str, Any] = {"gate_weight": gate_weight, "scaling": SCALING, "backend": backend}
    call: Any = (
        partial(lmoe, x, lora_a, lora_b, **options)
        if scope == "delta"
        else partial(lmoe_linear, x, inputs.weight, None, lora_a, lora_b, **options)
    )
    return Step(call, grad_inputs)
