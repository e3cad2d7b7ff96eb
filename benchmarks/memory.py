"""Bytes: what a call allocates at its peak, what its backward keeps, what its operations move."""

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.baselines import Step
from benchmarks.limits import NARROW, Limits
from benchmarks.timing import Call
from lmoe_kernels import ops


def available_bytes(device: torch.device) -> int:
    """Memory that is free now; 8 GiB where the system does not tell."""
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
    """What a call has allocated at most, at one time, beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would announce itself on stderr
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
    """What the graph of one forward keeps alive, beyond the inputs, the leaves and the parameters themselves."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t if t._base is None else t._base, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = step.forward()
    for t in (*inputs.values(), *(leaf.tensor for leaf in step.leaves), y):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class OpCounter(TorchDispatchMode):
    """Counts what ATen operations read, write and multiply, as if no cache kept anything between two of them.

    `seconds` is what they take at the machine's limits, each by its bytes or its FLOPs. Views cost nothing. Operations of
    compiled code and kernels of our own are not seen: their rows have no count.
    """

    def __init__(self, limits: Limits, dtype: str) -> None:
        super().__init__()
        self.limits, self.dtype = limits, dtype
        self.bytes = 0
        self.flops = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation, and count it."""
        kwargs = kwargs or {}
        for op, body in ((ops.forward, ops._forward), (ops.backward, ops._backward)):
            if func is op:
                with self:  # the package's operations count as what their backend does
                    return body(*args, **kwargs)
        if func._can_decompose():
            with self:  # as autograd would have taken it apart; the package's operations come from below autograd
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        writes = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        reads = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        if not reads or not writes or name.startswith(("empty", "new_empty")):
            return
        in_place = func._schema.is_mutable
        if not in_place and all(any(_shares(w, r) for r in reads) for w in writes):
            return  # a view
        flops, rate = 0, self.limits.gemm_flops_per_s[self.dtype]
        if name.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm", "addbmm"):
            inner = [t for t in reads if t.dim() >= 2][-2].shape[-1]
            flops = 2 * writes[0].numel() * inner
            if min(inner, *writes[0].shape[-2:]) <= NARROW:
                rate = self.limits.narrow_flops_per_s[self.dtype]
        if name in ("copy_", "fill_", "zero_") or kwargs.get("beta") == 0:
            reads = reads[1:]  # what is overwritten is not read
        moved = sum(map(_bytes, reads)) + sum(map(_bytes, writes))
        self.bytes += moved
        self.flops += flops
        self.seconds += max(moved / self.limits.copy_bytes_per_s, flops / rate)


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _bytes(t: Tensor) -> int:
    """Of a broadcast tensor what there is of it."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
