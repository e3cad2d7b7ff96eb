"""`RoutingStats` reads nothing from the device while the model runs: neither by a call of Python nor by an operator."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_kernels import LMoELinear
from lmoe_kernels.routing import RoutingStats, stats
from tests.models import llama, with_experts

READS = {"item", "__bool__", "__int__", "__float__", "__index__", "tolist", "numpy", "cpu", "nonzero", "equal", "is_nonzero"}
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero", "item")


class NoReads(TorchFunctionMode):
    """Raises if values of a tensor are read, or if a tensor indexes another by a mask."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        assert name not in READS, f"{name} reads the device"
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, Tensor) for i in index), "indexing by a tensor reads the device"
        return function(*args, **(kwargs or {}))


class NoSyncs(TorchDispatchMode):
    """Raises at an operator that waits for the device, or that copies to another one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in SYNCS, f"aten::{name} waits for the device"
        return function(*args, **(kwargs or {}))


def model(**options: Any) -> Any:
    return with_experts(llama(), **options)


def run(of_model: Any, options: dict[str, Any] | None = None) -> RoutingStats:
    ids = torch.randint(1, 32, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with RoutingStats(of_model, labels=["a", "b"]) as counting:
        of_model(ids)
        with counting.label("a"):
            of_model(input_ids=ids, attention_mask=mask)
        with counting.label(torch.tensor([0, 1, -1])):
            of_model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            of_model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
        counting.snapshot(1)
    return counting


def guard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let what `RoutingStats` does after each forward run where reads and waits raise."""
    count, calls = RoutingStats._count, []

    def guarded(self: RoutingStats, batch: dict[str, Any]) -> None:
        calls.append(1)
        with NoReads(), NoSyncs():
            count(self, batch)

    monkeypatch.setattr(RoutingStats, "_count", guarded)
    return calls


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 2, "choice_bias": True}], ids=str)
def test_counting_reads_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = guard(monkeypatch)
    counting = run(model(**options))
    assert len(calls) == 6
    monkeypatch.undo()
    assert counting.summary()


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: t.tolist(),
        lambda t: torch.nonzero(t),
        lambda t: t.cpu(),
        lambda t: torch.bincount(t.flatten().long().abs()),
    ],
    ids=["item", "bool", "mask", "tolist", "nonzero", "cpu", "bincount"],
)
def test_the_guard_finds_a_read(read: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shares = stats.shares
    monkeypatch.setattr(stats, "shares", lambda logits, *rest: (read(logits), shares(logits, *rest))[1])
    guard(monkeypatch)
    with pytest.raises(AssertionError, match="device"):
        run(model())


def test_the_trace_of_a_training_step_has_no_more_waits_than_without() -> None:
    of_model, ids = model().train(), torch.randint(1, 32, (3, 9))
    of_model(ids, labels=ids).loss.backward()

    def waits() -> Counter[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            of_model(ids, labels=ids).loss.backward()
        names = Counter({event.key: event.count for event in trace.key_averages()})
        assert names["aten::mm"] > 0
        return Counter({name: names[name] for name in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")})

    without = waits()
    with RoutingStats(of_model):
        inside = waits()
    assert inside == without


def test_no_memory_is_kept_but_the_sums() -> None:
    """The logits of a forward are freed with the block, and the sums do not grow with the tokens."""
    layer = LMoELinear(4, 4, num_experts=3, rank=1)
    with RoutingStats(layer) as counting:
        for tokens in (1, 100):
            layer(torch.randn(2, tokens, 4))
            assert [tuple(sums.shape) for sums in counting._sums.values()] == [(1, 1, 8)]
        logits = counting._counted[next(iter(counting._counted))]
        assert logits() is not None
    assert logits() is None
