"""The cost of a training step, its time, peak memory and saved activations, for four kinds of adapters.

This file needs nothing but the package and PEFT, so it can be copied; `python -m benchmarks` measures single layers.
"""

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lmoe_kernels as lk


def measure_costs(base: nn.Module, mixture: nn.Module, batch: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step (forward and backward), its peak memory, and the bytes a token saved for the backward.

    The ways are timed in turn, `repeats` times; a row reports its median. Peak memory is what the step adds to the model.
    """
    layers = list(lk.lmoe_layers(mixture).values())
    for layer in layers:
        layer.output_router_logits = False  # no loss looks at them here
    experts = layers[0].num_experts
    loop = lora_loop(base, experts, layers[0].rank)
    ways: dict[str, Callable[[], Tensor]] = {
        "frozen model": lambda: _loss(base, batch),
        "L-MoE, torch backend": lambda: _loss(mixture, batch, "torch"),
        "L-MoE, literal definition": lambda: _loss(mixture, batch, "reference"),
        f"loop over {experts} PEFT LoRAs": lambda: _loss(loop, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, loss in ways.items():
            seconds = _seconds(loss)
            if turn > 0:  # the first turn warms up
                times[name].append(seconds)
    tokens = batch[:, 1:].numel()
    return {
        name: {
            "milliseconds": round(1e3 * statistics.median(times[name]), 1),
            "peak_mib": round(_peak_bytes(loss) / 2**20, 1),
            "saved_bytes_per_token": round(_saved_bytes(loss) / tokens),
        }
        for name, loss in ways.items()
    }


class LoraLoop(nn.Module):
    """The common mixture of LoRAs: each adapter's output in turn, weighted by a gate, added to the frozen layer's."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.lora = lora.requires_grad_(True)
        weight = lora.base_layer.requires_grad_(False).weight
        self.gate = nn.Linear(weight.shape[1], len(lora.lora_A), bias=False, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to y (..., O)."""
        gates = self.gate(x).softmax(dim=-1)
        y = self.lora.base_layer(x)
        for expert, name in enumerate(self.lora.lora_A):
            delta = self.lora.lora_B[name](self.lora.lora_A[name](x)) * self.lora.scaling[name]
            y = y + gates[..., expert, None] * delta
        return y


def lora_loop(base: Any, experts: int, rank: int) -> nn.Module:
    """A copy of the model with so many PEFT LoRAs on every linear layer, mixed in a loop."""
    config = LoraConfig(r=rank, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="expert0")
    for expert in range(1, experts):
        model.add_adapter(f"expert{expert}", config)
    for name, module in list(model.named_modules()):
        if isinstance(module, PeftLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoraLoop(module))
    return model


def _loss(model: Any, batch: Tensor, backend: Literal["torch", "reference"] | None = None) -> Tensor:
    """The loss, its backward reaching down to the embeddings in every model."""
    embedded = model.get_input_embeddings()(batch[:, :-1]).detach().requires_grad_()
    with lk.use_backend(backend):
        logits = model(inputs_embeds=embedded).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _seconds(loss: Callable[[], Tensor]) -> float:
    """Wall time of a forward and backward."""
    _wait()
    start = time.perf_counter()
    loss().backward()
    _wait()
    return time.perf_counter() - start


def _peak_bytes(loss: Callable[[], Tensor]) -> int:
    """The most memory that a forward and backward have allocated at one time, beyond what was allocated before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss().backward()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler reports its start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss().backward()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = [event["args"] for event in events if event.get("name") == "[memory]"]
    return max(h["Total Allocated"] for h in held) - (held[0]["Total Allocated"] - held[0]["Bytes"])


def _saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, without the parameters; each storage is counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = loss()
    total = sum(storages.values())
    del kept_alive
    return total


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
