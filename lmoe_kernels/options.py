# SPDX-License-Identifier: Apache-2.0
"""The tuples that describe one call: its factors, options and sizes, what the forward saves, and the gradients.

`functional` creates the factors and the options, and every backend gets them as tuples. They are unpacked in only two
places: at the schema of the ops, which accepts tensors and numbers, and at the launch of a kernel.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mixing = Literal["factors", "outputs"]


class Factors(NamedTuple):
    """The experts and their gate. Exactly one of `gate_weight` and `gate_logits` is given."""

    lora_a: Tensor  # (E, R, I), or (1, R, I) if all experts share one A
    lora_b: Tensor  # (E, R, O)
    gate_weight: Tensor | None = None  # (E, I)
    gate_bias: Tensor | None = None  # (E), added to the logits; only with gate_weight
    gate_logits: Tensor | None = None  # (T, E), the logits of an outside router, or the gates if `Options.softmax` is False

    def sizes(self, tokens: int) -> "Sizes":
        """The sizes of a call with this number of tokens."""
        experts_of_a, _, in_features = self.lora_a.shape
        experts, rank, out_features = self.lora_b.shape
        return Sizes(tokens, in_features, out_features, experts, rank, experts_of_a)


class Options(NamedTuple):
    """The options of a call that are neither tensors nor sizes. `lmoe` documents their meaning."""

    scaling: float = 1.0
    mixing: Mixing = "factors"
    top_k: int | None = None
    renormalize: bool = True
    dropout: float = 0.0  # the ops apply it, with the backend's function `dropout`; forward and backward ignore it
    softmax: bool = True  # False: `Factors.gate_logits` are the gates themselves; top_k is None then

    @property
    def averages_factors(self) -> bool:
        """True if A and B are averaged, False if the experts' outputs are. An unknown mixing raises KeyError."""
        return _AVERAGES_FACTORS[self.mixing]

    def kept(self, num_experts: int) -> int:
        """How many experts each token keeps."""
        return num_experts if self.top_k is None else min(self.top_k, num_experts)

    def gates_sum_to_one(self, num_experts: int) -> bool:
        """Whether the gates are a softmax over exactly the experts that are kept."""
        return self.softmax and (self.renormalize or self.kept(num_experts) == num_experts)

    def may_group(self, sizes: "Sizes") -> bool:
        """Whether a backend may group the tokens by expert, whatever their number is.

        It pays only for few of many experts, and only where memory is not the limit, beyond E R of about 256.
        """
        return 2 * self.kept(sizes.E) < sizes.E == sizes.experts_of_a and sizes.E * sizes.R > 256

    def route_shape(self, sizes: "Sizes") -> tuple[int, int]:
        """The shape (K, 2 T + E + 1) of `Saved.route`, where tokens are grouped."""
        return self.kept(sizes.E), 2 * sizes.T + sizes.E + 1


class Sizes(NamedTuple):
    """The sizes of a call: T tokens, I in_features, O out_features, E experts, R rank."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    R: int
    experts_of_a: int  # E, or 1 if all experts share one A

    def __str__(self) -> str:
        return f"T={self.T} I={self.I} O={self.O} E={self.E} R={self.R}"


class Problem(NamedTuple):
    """What the choice of a backend depends on: the sizes of the call, and the dtype and device of x."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    stacked: bool = False  # whether it is a call of `lmoe_stacked_`

    @property
    def on_cpu(self) -> bool:
        """Whether the device is the CPU. To read `device.type` takes 10 us with cold caches (Intel Xeon, 2026-11-26)."""
        return self.device in _CPU

    def __str__(self) -> str:
        return f"{self.sizes}, {self.dtype} on {self.device}"


class Saved(NamedTuple):
    """What a forward saves for its backward."""

    logits: Tensor | None  # (T, E) in fp32 (fp64 for fp64); None if an outside router computed them
    u: Tensor  # (T, E, R) or (T, 1, R), A_e x in x's dtype; elements of experts that a token does not keep may be undefined
    route: Tensor | None = None  # (K, 2 T + E + 1) int32, how the tokens were grouped; None if they were not
    cast: Tensor | None = None  # the buffer of `casting.cast_factors`; None if nothing was cast, or not by this backend

    def router_logits(self, factors: Factors) -> Tensor:
        """The logits that the gates were computed from, of the forward or of an outside router; or gates that were given."""
        logits = factors.gate_logits if self.logits is None else self.logits
        assert logits is not None
        return logits


class StackSaved(NamedTuple):
    """What the forward of a stack of n projections saves for its backward. The row t n + i is projection i of token t."""

    logits: Tensor | None  # (T n, E) in fp32 (fp64 for fp64); None if outside routers computed them
    u: Tensor  # (T n, E, R) in x's dtype
    rows: Tensor  # (n E R + n E, I) in x's dtype: all A, then all gates if there are gates
    lora_b: tuple[Tensor, ...]  # (E, R, O) of each projection in x's dtype


class Block(NamedTuple):
    """One of the mixtures that `lmoe_stacked_` adds in one call: its sizes, its options, its columns of y, its tokens."""

    num_experts: int
    rank: int
    out_features: int
    column: int = 0  # the first of its columns of y
    shared_a: bool = False
    scaling: float = 1.0
    mixing: Mixing = "factors"
    top_k: int | None = None
    renormalize: bool = True
    group: int = 0  # it is added to the tokens of this group; to all tokens if the call has no groups

    @property
    def options(self) -> Options:
        """The options of the mixture as those of a call of `lmoe`."""
        return Options(float(self.scaling), self.mixing, self.top_k, self.renormalize)

    @property
    def rows_of_a(self) -> int:
        """The rows of the block in `StackedFactors.lora_a`."""
        return self.rank if self.shared_a else self.num_experts * self.rank

    @property
    def kind(self) -> tuple[object, ...]:
        """What the gates and the blend depend on, but for the scaling: blocks of one kind can be mixed together."""
        return self.num_experts, self.rank, self.shared_a, self.mixing, self.top_k, self.renormalize


class Place(NamedTuple):
    """Where a block is in the stacked tensors, and in the columns of y."""

    a: slice  # rows of lora_a
    experts: slice  # rows of gate_weight, elements of gate_bias, columns of gate_logits
    b: slice  # elements of lora_b
    columns: slice


@lru_cache(4096)
def places_of(blocks: tuple[Block, ...]) -> tuple[Place, ...]:
    """The place of each block: the blocks follow one another in every stacked tensor."""
    places, a, experts, b = [], 0, 0, 0
    for block in blocks:
        numbers = block.num_experts * block.rank * block.out_features
        ends = a + block.rows_of_a, experts + block.num_experts, b + numbers
        columns = slice(block.column, block.column + block.out_features)
        places.append(Place(slice(a, ends[0]), slice(experts, ends[1]), slice(b, ends[2]), columns))
        a, experts, b = ends
    return tuple(places)


class StackedFactors(NamedTuple):
    """The experts and gates of all blocks, one block after the other. A, B have x's dtype, see `StackedExperts`."""

    lora_a: Tensor  # (sum of E R, or R where A is shared, I)
    lora_b: Tensor  # (sum of E R O): (E, R, O) of each block
    gate_weight: Tensor | None  # (sum of E, I); exactly one of it and gate_logits is given
    gate_bias: Tensor | None  # (sum of E), fp32, added to the logits
    gate_logits: Tensor | None  # (T, sum of E), fp32

    def of_block(self, block: Block, place: Place) -> Factors:
        """The factors of one block, with gate_logits in place of the gate where they are given."""
        lora_a, lora_b, gate_weight, gate_bias, logits = self
        experts, rank = block.num_experts, block.rank
        return Factors(
            lora_a[place.a].unflatten(0, (-1, rank)),
            lora_b[place.b].view(experts, rank, block.out_features),
            None if gate_weight is None else gate_weight[place.experts],
            None if gate_bias is None else gate_bias[place.experts],
            None if logits is None else logits[:, place.experts],
        )


class TokenGroups(NamedTuple):
    """Which blocks are added to which token, and with which factor."""

    group: Tensor  # (T) int32 or int64; a token whose number no block has gets no delta
    scale: Tensor | None  # (T), fp32


class Wanted(NamedTuple):
    """Which gradients a backward must compute."""

    x: bool
    lora_a: bool
    lora_b: bool
    gate_weight: bool
    gate_bias: bool
    gate_logits: bool

    @property
    def gate(self) -> bool:
        """Whether the gradient of the logits is needed, for the gate's parameters or for an outside router."""
        return self.gate_weight or self.gate_bias or self.gate_logits


class Gradients(NamedTuple):
    """The gradients of x and of all factors, with the shape and dtype of their tensors; None if not wanted."""

    x: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    gate_logits: Tensor | None = None


_CPU = torch.device("cpu"), torch.device("cpu:0")
_AVERAGES_FACTORS: dict[str, bool] = {"factors": True, "outputs": False}
