"""What one call is made of: its factors, its options, its sizes, and the gradients that it gives.

These tuples are made in `functional` and travel whole from there to every backend. They are taken apart in two places only:
at the schema of the ops, which takes tensors and numbers, and where a kernel is launched.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mixing = Literal["factors", "outputs"]


class Factors(NamedTuple):
    """The experts and their gate. Exactly one of `gate_weight` and `gate_logits` is given."""

    lora_a: Tensor  # (E, R, I), or (1, R, I) where all experts share one A
    lora_b: Tensor  # (E, R, O)
    gate_weight: Tensor | None = None  # (E, I)
    gate_bias: Tensor | None = None  # (E), added to the logits; only with gate_weight
    gate_logits: Tensor | None = None  # (T, E), the logits of an outside router

    def sizes(self, tokens: int) -> "Sizes":
        """The sizes of a call with so many tokens."""
        experts_of_a, _, in_features = self.lora_a.shape
        experts, rank, out_features = self.lora_b.shape
        return Sizes(tokens, in_features, out_features, experts, rank, experts_of_a)


class Options(NamedTuple):
    """What is neither tensor nor size; see `lmoe` for the meaning."""

    scaling: float = 1.0
    mixing: Mixing = "factors"
    top_k: int | None = None
    renormalize: bool = True

    @property
    def averages_factors(self) -> bool:
        """Whether A and B are averaged, or the experts' outputs. A third mixing is an error here, not one of the two."""
        return _AVERAGES_FACTORS[self.mixing]

    def kept(self, num_experts: int) -> int:
        """How many experts each token keeps."""
        return num_experts if self.top_k is None else min(self.top_k, num_experts)

    def gates_sum_to_one(self, num_experts: int) -> bool:
        """Whether the softmax runs over exactly the experts that are kept."""
        return self.renormalize or self.kept(num_experts) == num_experts


class Sizes(NamedTuple):
    """The letters of a call."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    R: int
    experts_of_a: int  # E, or 1 where all experts share one A

    def __str__(self) -> str:
        return f"T={self.T} I={self.I} O={self.O} E={self.E} R={self.R}"


class Problem(NamedTuple):
    """What the choice of a backend depends on: sizes, dtype and device of x, never what is in the tensors."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.sizes}, {self.dtype} on {self.device}"


class Saved(NamedTuple):
    """What a forward leaves for its backward."""

    logits: Tensor | None  # (T, E) in fp32 (fp64 for fp64); None where they came from outside
    u: Tensor  # (T, E, R) or (T, 1, R), x's dtype; may be unwritten for experts that a token does not keep

    def router_logits(self, factors: Factors) -> Tensor:
        """The logits that the gates were made of: the forward's own, or the outside router's."""
        logits = factors.gate_logits if self.logits is None else self.logits
        assert logits is not None
        return logits


class Wanted(NamedTuple):
    """Which gradients a backward is asked for."""

    x: bool
    lora_a: bool
    lora_b: bool
    gate_weight: bool
    gate_bias: bool
    gate_logits: bool

    @property
    def gate(self) -> bool:
        """Whether the gradient of the logits is needed for the gate's parameters or an outside router."""
        return self.gate_weight or self.gate_bias or self.gate_logits


class Gradients(NamedTuple):
    """The gradients of x and of all factors; None where not wanted. Each has its tensor's shape and dtype."""

    x: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    gate_logits: Tensor | None = None


_AVERAGES_FACTORS: dict[str, bool] = {"factors": True, "outputs": False}
