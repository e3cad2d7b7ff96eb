"""Random calls of `lmoe_stacked_`, with their truth in float64 and with what plain PyTorch makes of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmoe_kernels import reference
from lmoe_kernels.options import Block, StackedFactors, TokenGroups, places_of
from lmoe_kernels.serving import StackedExperts, lmoe_stacked_
from tools.error_rule import ORDERS, assert_no_worse
from tools.factored import factored

ONE = [Block(4, 3, 17)]
QKV = [Block(4, 8, 48), Block(4, 8, 16, column=48), Block(4, 8, 16, column=64)]
MIXED = [
    Block(5, 3, 33, scaling=0.5),
    Block(2, 7, 20, column=35, mixing="outputs", top_k=1, scaling=-1.5),
    Block(6, 4, 11, column=60, top_k=2, renormalize=False),
    Block(3, 5, 8, column=71, shared_a=True, scaling=2.0),
]
ADAPTERS = [
    Block(4, 8, 48, group=0), Block(4, 8, 16, column=48, group=0),
    Block(4, 8, 48, group=1), Block(4, 8, 16, column=48, group=1),
    Block(3, 5, 48, group=7, mixing="outputs", top_k=2), Block(2, 2, 9, column=50, group=7, shared_a=True),
]  # fmt: skip
STACKS = {"one": ONE, "qkv": QKV, "mixed": MIXED, "adapters": ADAPTERS}


def of_adapters(blocks: Sequence[Block], adapters: int) -> list[Block]:
    """The same blocks for each of so many adapters."""
    return [block._replace(group=group) for group in range(adapters) for block in blocks]


class Call(NamedTuple):
    """A random call: what is changed, what is read, and for whom."""

    y: Tensor
    x: Tensor
    experts: StackedExperts
    logits: Tensor | None
    groups: TokenGroups | None

    def run(self, backend: str, before: int = 2) -> Tensor:
        """The result in a tensor whose rows lie apart, between numbers that nothing may touch."""
        columns = self.y.shape[1]
        padded = self.y.new_full((self.y.shape[0], before + columns + 3), float("nan"))
        y = padded[:, before : before + columns]
        y.copy_(self.y)
        assert self.add(y, backend) is y
        assert padded[:, :before].isnan().all()
        assert padded[:, before + columns :].isnan().all()
        return y

    def add(self, y: Tensor, backend: str) -> Tensor:
        """The call on a y of the caller's."""
        group, scale = self.groups or (None, None)
        return lmoe_stacked_(
            y, self.x, self.experts, gate_logits=self.logits, token_group=group, token_scale=scale, backend=backend
        )

    def true(self) -> Tensor:
        """The literal definition in float64."""
        y, factors = self.y.to(torch.float64, copy=True), self._factors(torch.float64)
        reference.add_stacked(y, self.x.double(), factors, self.experts.blocks, self.groups)
        return y

    def plain(self) -> list[Tensor]:
        """Plain PyTorch's results in x's dtype, for several orders of the features."""
        return [self.in_plain_pytorch(self.x.dtype, torch.randperm(self.x.shape[1])) for _ in range(ORDERS)]

    def in_plain_pytorch(self, dtype: torch.dtype, order: Tensor) -> Tensor:
        """The factored form in a dtype, with the features of x in this order."""
        x, y, factors = self.x.to(dtype), self.y.to(dtype, copy=True), self._factors(dtype)
        blocks = self.experts.blocks
        for block, place in zip(blocks, places_of(blocks), strict=True):
            of_block = factors.of_block(block, place)
            gate, logits = of_block.gate_weight, of_block.gate_logits
            if logits is not None and of_block.gate_bias is not None:
                of_block = of_block._replace(gate_logits=logits + of_block.gate_bias, gate_bias=None)
            gate = None if gate is None else gate[:, order]
            of_block = of_block._replace(lora_a=of_block.lora_a[:, :, order], gate_weight=gate)
            delta, _ = factored(x[:, order], of_block, block.options)
            if self.groups is not None:
                scale = 1.0 if self.groups.scale is None else self.groups.scale[:, None]
                delta = (delta * scale).where((self.groups.group == block.group)[:, None], 0.0)
            y[:, place.columns] += delta.to(dtype)
        return y

    def _factors(self, dtype: torch.dtype) -> StackedFactors:
        return StackedFactors(*(None if t is None else t.to(dtype) for t in self.experts.factors(self.logits)))


def make_call(
    blocks: Sequence[Block],
    dtype: torch.dtype,
    tokens: int = 7,
    features: int = 24,
    *,
    groups: str = "",
    outside: bool = False,
    device: str = "cpu",
) -> Call:
    """Draw a call, without tokens for which a rounding could change the choice of experts."""
    experts = StackedExperts(blocks, features, dtype=dtype, device=device, gate_bias=True)
    for index, block in enumerate(blocks):
        for name, scale in (("lora_a", features), ("lora_b", block.rank), ("gate_weight", features), ("gate_bias", 1)):
            experts.fill(index, name, torch.randn(experts.part(index, name).shape) * scale**-0.5)
    pool = torch.randn(16 * tokens + 16, features, dtype=dtype, device=device)
    of_gates = pool.double() @ experts.gate_weight.double().T
    if outside:
        of_gates = torch.randn_like(of_gates)
    wide = torch.promote_types(dtype, torch.float32)
    of_gates = of_gates.to(wide)
    keep = _gaps(of_gates + experts.gate_bias, blocks).argsort(descending=True)[:tokens]
    columns = max(block.column + block.out_features for block in blocks)
    chosen = None
    if groups:
        numbers = torch.tensor(sorted({block.group for block in blocks} | {-1}), device=device)
        group = numbers[torch.randint(len(numbers), (tokens,), device=device)]
        scale = torch.rand(tokens, device=device) if "scale" in groups else None
        chosen = TokenGroups(group.int() if "int" in groups else group, scale)
    y = torch.randn(tokens, columns, dtype=dtype, device=device)
    return Call(y, pool[keep], experts, of_gates[keep] if outside else None, chosen)


def _gaps(logits: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The smallest gap (T) between the last kept and the first dropped logit of any block."""
    gaps = logits.new_full((len(logits),), float("inf"))
    for block, place in zip(blocks, places_of(tuple(blocks)), strict=True):
        if block.top_k is not None and block.top_k < block.num_experts:
            ordered = logits[:, place.experts].sort(dim=1, descending=True).values
            gaps = torch.minimum(gaps, ordered[:, block.top_k - 1] - ordered[:, block.top_k])
    return gaps


def assert_isolated(value: float, backend: str, exact: torch.dtype) -> None:
    """Fail if NaN or infinite numbers of an adapter reach tokens of another one."""
    call = make_call(of_adapters(QKV, 3), exact, tokens=35, groups="with scale")
    assert call.groups is not None
    group, scale = call.groups.group, call.groups.scale
    assert scale is not None
    expected, true, foreign = call.plain(), call.true(), group == 1
    for index in range(3, 6):
        for name in ("lora_a", "lora_b", "gate_weight", "gate_bias"):
            call.experts.part(index, name).fill_(value)
    call.x[foreign] = value
    scale[foreign] = value
    y = call.run(backend)
    assert_no_worse("y", y[~foreign], [one[~foreign] for one in expected], true[~foreign])
    assert torch.equal(y[group == -1], call.y[group == -1])
    assert not y[foreign].isfinite().any()
