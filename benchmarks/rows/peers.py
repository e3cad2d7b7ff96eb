"""PEFT's own layers as rows. Importing this file imports PEFT."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, inject_adapter_in_model
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

from benchmarks.rows.shapes import SCALING, Inputs
from benchmarks.rows.steps import GradInput, Step, compile_fixed, grad_input


def one(inputs: Inputs) -> Step:
    """One LoRA, the adapters in the activations' dtype."""
    return _call(*_layer(inputs, 1, inputs.x.dtype), inputs)


def one_fp32(inputs: Inputs) -> Step:
    """One LoRA as `get_peft_model` makes it: the adapters in fp32 whatever the activations are."""
    return _call(*_layer(inputs, 1, torch.float32), inputs)


def one_compiled(inputs: Inputs) -> Step:
    """One LoRA, the adapters in the activations' dtype, through torch.compile."""
    layer, grad_inputs = _layer(inputs, 1, inputs.x.dtype)
    return _call(compile_fixed(layer), grad_inputs, inputs)


def all_active(inputs: Inputs) -> Step:
    """E adapters, all active, their deltas summed without a gate."""
    return _call(*_layer(inputs, inputs.shape.num_experts, inputs.x.dtype), inputs)


def xlora(inputs: Inputs) -> Step:
    """X-LoRA's layer around E adapters. Only the gates are trained, which come from outside; the adapters are frozen."""
    layer, _ = _layer(inputs, inputs.shape.num_experts, inputs.x.dtype)
    layer.requires_grad_(False)
    config = XLoraConfig(hidden_size=inputs.shape.in_features, adapters={})
    model: Any = SimpleNamespace(disabled=False)  # the only field of its model that the layer reads
    mixed = XLoraLinearLayer(model, layer, layer.forward, 0, config)
    grad_inputs = grad_input(inputs, "x"), grad_input(inputs, "gates")
    x, gates = (tensor for tensor, *_ in grad_inputs)
    # its shapes are (batch, sequence, features) and (batch, sequence, layers, experts)
    return Step(lambda: mixed.forward(x[None], scalings=gates[None, :, None])[0], grad_inputs)


def _call(layer: Callable[[Tensor], Tensor], adapters: tuple[GradInput, ...], inputs: Inputs) -> Step:
    x = grad_input(inputs, "x")
    return Step(lambda: layer(x.tensor), (x, *adapters))


def _layer(inputs: Inputs, adapters: int, dtype: torch.dtype) -> tuple[Any, tuple[GradInput, ...]]:
    """PEFT's LoRA layer around the frozen weight, with the first experts of the inputs as its adapters."""
    shape = inputs.shape
    linear = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
    holder, names = nn.Sequential(linear), [f"expert_{e}" for e in range(adapters)]
    config = LoraConfig(r=shape.rank, lora_alpha=int(SCALING * shape.rank), target_modules=["0"], lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a second adapter, which is intended here
        for name in names:
            inject_adapter_in_model(config, holder, adapter_name=name)
    layer: Any = holder[0]
    layer.set_adapter(names)
    grad_inputs = []
    for e, name in enumerate(names):
        a, b = layer.lora_A[name], layer.lora_B[name]
        a.weight = nn.Parameter(inputs.lora_a[e].to(dtype))
        b.weight = nn.Parameter(inputs.lora_b[e].t().contiguous().to(dtype))
        grad_inputs += [GradInput(a.weight, "lora_a", e), GradInput(b.weight, "lora_b", e, transposed=True)]
    return layer, tuple(grad_inputs)
