"""Force a backend to use a given plan whatever the sizes are, so that tiny problems run all of its kernels."""

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from lmoe_kernels.options import Options, Sizes

PLANS = [  # of the backends that have several
    ("triton", "few processors"),  # one pass, or two if a case has too many columns
    ("triton", "many processors"),  # features and tokens in splits
    ("triton", "in groups"),  # tokens grouped by expert, if only some experts are kept
    ("cuda", "decode"),
    ("cuda", "one pass"),
    ("cuda", "stages"),
    ("cuda", "parts"),  # features and tokens in splits
]


def force(backend: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a backend use a plan until the test ends."""
    if backend == "triton":
        _force_triton(plan, monkeypatch)
    elif backend == "cuda":
        _force_cuda(plan, monkeypatch)


def _force_triton(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, plans = (import_module(f"lmoe_kernels.backends.triton.{name}") for name in ("configs", "plans"))
    set_chip(plans.Chip("interpreter", 64 if plan == "many processors" else 1, 1 << 16), monkeypatch)
    grouped_plan = configs.grouped_plan

    def of_many(sizes: Sizes, *rest: Any) -> Any:
        """The plan for more tokens and experts, for which the backend groups tokens."""
        experts = max(sizes.E, 65)
        many = sizes._replace(T=1 << 20, E=experts, experts_of_a=experts if sizes.experts_of_a == sizes.E else 1)
        return grouped_plan(many, *rest)

    if plan == "in groups":
        let_few_ranks_be_grouped(monkeypatch)
        monkeypatch.setattr(configs, "grouped_plan", of_many)


def let_few_ranks_be_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tokens be grouped by expert also where E R is so small that it does not pay."""
    monkeypatch.setattr(Options, "may_group", lambda self, sizes: sizes.experts_of_a == sizes.E)


def set_chip(chip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the Triton backend plan for a chip, and take its tiles, until the test ends."""
    monkeypatch.setattr("lmoe_kernels.backends.triton.host.chip_of", lambda device: chip)


def _force_cuda(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any tile fills a GPU of one processor; none fills a million processors."""
    configs = import_module("lmoe_kernels.backends.cuda.configs")
    forward, backward = _modules("cuda")
    one_pass_smem, processors = configs.one_pass_smem, 1 if plan == "one pass" else 1 << 20
    if plan != "decode":
        monkeypatch.setattr(forward, "decode_plan", lambda *sizes: None)
    monkeypatch.setattr(forward, "one_pass_smem", lambda *sizes: one_pass_smem(*sizes[:-1], processors))
    parts = 2 if plan == "parts" else 1
    for module in (forward, backward):
        monkeypatch.setattr(module, "shrink_parts", lambda *sizes: parts)
    monkeypatch.setattr(backward, "wgrad_splits", lambda *sizes: parts)


def _modules(backend: str) -> tuple[ModuleType, ModuleType]:
    """The modules `forward` and `backward` of a backend."""
    first, second = (import_module(f"lmoe_kernels.backends.{backend}.{name}") for name in ("forward", "backward"))
    return first, second
