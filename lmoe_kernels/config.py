# SPDX-License-Identifier: Apache-2.0
"""The options of one L-MoE layer: their defaults, their checks, and the shapes of the layer's parameters."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args

from lmoe_kernels import checks
from lmoe_kernels.dispatch import BackendName, check_name
from lmoe_kernels.options import Mixing, Options

# The options that decide what a layer computes. A checkpoint stores these and no others.
CONFIG_KEYS = (
    "num_experts", "rank", "alpha", "mixing", "top_k", "renormalize", "shared_a", "gate_bias", "choice_bias", "expert_names",
    "router", "router_reads",
)  # fmt: skip
RouterScope = Literal["layer", "group", "block", "model"]  # the layers that share a router
RouterReads = Literal["token", "prefix"]
_NAMES_IN_PEFT = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


class LayerConfig(NamedTuple):
    """The keywords of `LMoELinear`; their meaning is documented there."""

    num_experts: int = 8
    rank: int = 16
    alpha: float | None = None
    mixing: Mixing = "factors"
    top_k: int | None = None
    renormalize: bool = True
    shared_a: bool = False
    gate_bias: bool = False
    choice_bias: bool = False
    expert_names: Sequence[str] | None = None
    router: RouterScope = "layer"
    router_reads: RouterReads = "token"
    dropout: float = 0.0
    gate_init_std: float | None = None
    output_router_logits: bool = False
    backend: BackendName | None = None

    def check(self) -> None:
        """Check every option.

        Raises:
            ValueError: an option does not fit.
            TypeError: an option has the wrong type.
        """
        op = "LMoELinear"
        checks.check_positive_int(op, "num_experts", self.num_experts)
        checks.check_positive_int(op, "rank", self.rank)
        if self.alpha is not None:
            checks.check_finite(op, "alpha", self.alpha, "be None or a finite number")
        for name in ("shared_a", "gate_bias", "choice_bias", "output_router_logits"):
            checks.check_bool(op, name, getattr(self, name))
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        options = Options(scaling, self.mixing, self.top_k, self.renormalize, self.dropout)
        checks.check_options(op, self.num_experts, options)
        if self.choice_bias and (self.top_k is None or not self.renormalize):
            got = f"top_k={self.top_k}, renormalize={self.renormalize}"
            checks.fail(op, "choice_bias", "be False unless top_k is given and renormalize is True", got)
        for name, kind in (("router", RouterScope), ("router_reads", RouterReads)):
            if getattr(self, name) not in get_args(kind):
                checks.fail(op, name, f"be one of {', '.join(map(repr, get_args(kind)))}", repr(getattr(self, name)))
        if self.choice_bias and not self.own_gate:
            got = f"router={self.router!r}, router_reads={self.router_reads!r}"
            checks.fail(op, "choice_bias", "be False unless each layer has a router of its own that reads the token", got)
        if self.expert_names is not None:
            check_expert_names(op, self.expert_names, self.num_experts)
        if self.gate_init_std is not None:
            must = "be None or a number of at least 0"
            checks.check_finite(op, "gate_init_std", self.gate_init_std, must, at_least=0)
        if self.backend is not None:
            check_name(op, self.backend)

    @property
    def own_gate(self) -> bool:
        """Whether the gate is part of the layer; else a `Router` computes the logits."""
        return self.router == "layer" and self.router_reads == "token"

    def default_alpha(self) -> float:
        """The alpha that is used for alpha=None: it makes the scaling twice the number of experts that share a token.

        Each expert has a gate of about one over that number, and so an effective scaling of 2, like a single LoRA with
        alpha = 2 * rank. Measured at learning rate 3e-3 (docs/defaults.md; Xeon, 2 cores, 2026-11-25), in bits per byte:
        3.262 for mixing="factors", 3.237 for "outputs", 3.298 for that LoRA; with a scaling of 1: 3.392 and 3.384.
        """
        sharing = self.top_k if self.top_k is not None and self.renormalize else self.num_experts
        return 2.0 * sharing * self.rank

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's experts and of its own gate, by name."""
        shapes: dict[str, tuple[int, ...]] = {
            "lora_a": (1 if self.shared_a else self.num_experts, self.rank, in_features),
            "lora_b": (self.num_experts, self.rank, out_features),
        }
        if self.own_gate:
            shapes["gate_weight"] = (self.num_experts, in_features)
        if self.own_gate and self.gate_bias:
            shapes["gate_bias"] = (self.num_experts,)
        if self.choice_bias:
            shapes["choice_bias"] = (self.num_experts,)
        return shapes

    def stored(self) -> dict[str, Any]:
        """The options that decide what a layer computes, by name. A checkpoint stores these."""
        return {key: getattr(self, key) for key in CONFIG_KEYS}

    def names(self) -> tuple[str, ...]:
        """The names of the experts: their numbers if they were not named."""
        return tuple(map(str, range(self.num_experts))) if self.expert_names is None else tuple(self.expert_names)


def check_expert_names(op: str, names: Sequence[str], num_experts: int) -> None:
    """Check that there is one name for each expert, and that no two are equal."""
    several = isinstance(names, Sequence) and not isinstance(names, str)
    if not several or not all(isinstance(name, str) and name for name in names):
        checks.fail(op, "expert_names", "be None or several str that are not empty", repr(names), TypeError)
    if len(names) != num_experts:
        checks.fail(op, "expert_names", f"have one name for each of num_experts = {num_experts} experts", len(names))
    if twice := [name for name in names if list(names).count(name) > 1]:
        checks.fail(op, "expert_names", "all be different", f"two experts of the name {twice[0]!r}")


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise TypeError for keywords that `LMoELinear` does not have, and suggest the nearest ones that it has."""
    got = ", ".join(map(_suggested, names))
    if got:
        known = ", ".join(map(repr, LayerConfig._fields))
        checks.fail("LMoELinear", "options", f"be among {known}", got, TypeError)


def _suggested(name: str) -> str:
    known: Any = LayerConfig._fields
    meant = _NAMES_IN_PEFT.get(name) or next(iter(get_close_matches(name, known, n=1)), None)
    return f"{name!r} (did you mean {meant!r}?)" if meant else repr(name)
