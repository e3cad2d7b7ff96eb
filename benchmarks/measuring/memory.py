"""Bytes: what is free, what a call allocates at its peak, and what its backward keeps."""

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.timing import Call
from benchmarks.rows.steps import Step


def available_bytes(device: torch.device) -> int:
    """Memory that is free now; 8 GiB where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier groups and their graphs gave back is free too
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 * 2**30


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most that a call has allocated at one time, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # otherwise the profiler reports its start and stop on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results: Any = profile.profiler and profile.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    peak = held = 0
    for _, allocated in events:
        held += allocated
        peak = max(peak, held)
    return peak


def saved_bytes(step: Step, inputs: dict[str, Tensor]) -> int:
    """What the graph of one forward keeps alive, beyond the inputs, the tensors that want gradients, and the parameters."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t if t._base is None else t._base, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = step.forward()
    for t in (*inputs.values(), *(grad_input.tensor for grad_input in step.grad_inputs), y):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())
