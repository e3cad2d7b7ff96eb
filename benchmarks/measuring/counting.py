"""Bytes and FLOPs of the ATen operations of a call, and the time that they let expect."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measuring.limits import NARROW, Limits
from lmoe_kernels import ops


class OpCounter(TorchDispatchMode):
    """Counts what ATen operations read, write and multiply, as if no cache kept anything between two of them.

    `seconds` is what they take at the machine's limits, each by its bytes or its FLOPs. Views cost nothing. Operations of
    compiled code and kernels of our own are not seen: their rows have no count. PyTorch's FlopCounterMode does not serve
    here: it counts 0 for `addmm_` (torch 2.13), which our backend and unsloth's order use.
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
            with self:  # autograd would have decomposed it; the package's operations are called below autograd
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
        if not in_place and all(any(_share_memory(w, r) for r in reads) for w in writes):
            return  # a view
        flops, rate = 0, self.limits.gemm_flops_per_s[self.dtype]
        if name.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm", "addbmm"):
            inner = [t for t in reads if t.dim() >= 2][-2].shape[-1]
            flops = 2 * writes[0].numel() * inner
            if min(inner, *writes[0].shape[-2:]) <= NARROW:
                rate = self.limits.narrow_flops_per_s[self.dtype]
        if name in ("copy_", "fill_", "zero_") or kwargs.get("beta") == 0:
            reads = reads[1:]  # what is overwritten is not read
        moved = sum(map(_stored_bytes, reads)) + sum(map(_stored_bytes, writes))
        self.bytes += moved
        self.flops += flops
        self.seconds += max(moved / self.limits.copy_bytes_per_s, flops / rate)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _stored_bytes(t: Tensor) -> int:
    """The bytes actually stored: a broadcast tensor repeats its elements without storing them again."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
