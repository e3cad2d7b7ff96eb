"""The table of all rows, and why one of them cannot be measured here."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.rows.baselines import eager, frozen, literal, loop, ours, unsloth
from benchmarks.rows.shapes import DTYPES, Inputs, Shape, timed_backends
from benchmarks.rows.steps import NotRun, Row, Step
from lmoe_kernels.dispatch import BACKENDS
from lmoe_kernels.options import Problem

LARGEST_FACTORS = 64 * 2**20  # bytes of A(t) and B(t) up to which the definition is run


def rows() -> Mapping[str, Row]:
    """Every row by name: baselines, other libraries, and the package's backends as they are registered now."""
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
    table += [row for name in timed_backends() for row in _backend_rows(name)]
    return {row.name: row for row in table}


def why_not_timed(backend: str, problem: Problem) -> str | None:
    """Why a backend is not timed: it cannot take the call, or on a CPU it only interprets or emulates its kernels."""
    row = BACKENDS[backend]
    return row.why_not(problem) or (row.why_not_by_default(problem) if problem.device.type == "cpu" else None)


def bytes_needed(row: Row, shape: Shape) -> int:
    """About what a row holds at its peak beyond the inputs, its adapters and their gradients included."""
    features, experts = shape.in_features + shape.out_features, shape.num_experts
    wide = row.wide_tokens * shape.tokens * features * shape.itemsize
    adapters = 2 * experts * (shape.rank * features + shape.in_features) * 4
    if row.name == "literal":  # A(t) and B(t) in fp32, with their gradients
        wide += 4 * shape.tokens * shape.rank * features * 4
    return wide + adapters


def _backend_rows(name: str) -> tuple[Row, Row]:
    """Experts in the activations' dtype, and in fp32 as `LMoELinear` has them."""
    label = f"ours, backend {name}"
    both = ("layer", "delta")

    def why_not(shape: Shape, device: torch.device) -> str | None:
        return why_not_timed(name, shape.problem(device))

    def why_not_fp32(shape: Shape, device: torch.device) -> str | None:
        same = f"the same as {name} in float32" if DTYPES[shape.dtype] == torch.float32 else None
        return why_not(shape, device) or same

    in_fp32 = partial(ours, name, dtype=torch.float32)
    return (
        Row(name, label, "factors", partial(ours, name), both, why_not),
        Row(f"{name}-fp32", f"{label}, fp32 experts (the default)", "factors", in_fp32, both, why_not_fp32),
    )


def _peer(name: str) -> Callable[[Inputs, str], Step]:
    """A row of `peers.py`, which imports PEFT: it is imported when the row is built, not before."""

    def build(inputs: Inputs, scope: str) -> Step:
        try:
            from benchmarks.rows import peers
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
    if size <= LARGEST_FACTORS:
        return None
    return f"its factors A(t), B(t) take {size / 2**20:.0f} MiB, {LARGEST_FACTORS // 2**20} at most are run"
