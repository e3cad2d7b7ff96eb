"""Several mixtures added to y in place: each backend against the definition in float64, and against plain PyTorch."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lmoe_kernels import reference
from lmoe_kernels.options import Block, StackedFactors, TokenGroups, places_of
from lmoe_kernels.serving import StackedExperts, lmoe_stacked_
from tools.error_rule import ORDERS, assert_no_worse
from tools.factored import factored
from tools.watch import AllocationWatch

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
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Call(NamedTuple):
    """A random call: what is changed, what is read, and for whom."""

    y: Tensor
    x: Tensor
    experts: StackedExperts
    logits: Tensor | None
    groups: TokenGroups | None

    def run(self, backend: str) -> Tensor:
        """The result in a tensor whose rows lie apart, between numbers that nothing may touch."""
        padded = torch.full((self.y.shape[0], self.y.shape[1] + 5), float("nan"), dtype=self.y.dtype)
        y = padded[:, 2:-3]
        y.copy_(self.y)
        group, scale = self.groups or (None, None)
        result = lmoe_stacked_(
            y, self.x, self.experts, gate_logits=self.logits, token_group=group, token_scale=scale, backend=backend
        )
        assert result is y
        assert padded[:, :2].isnan().all()
        assert padded[:, -3:].isnan().all()
        return y

    def true(self) -> Tensor:
        """The literal definition in float64."""
        y, factors = self.y.double(), self._factors(torch.float64)
        reference.add_stacked(y, self.x.double(), factors, self.experts.blocks, self.groups)
        return y

    def plain(self) -> list[Tensor]:
        """Plain PyTorch's results in x's dtype, for several orders of the features."""
        results, blocks, factors = [], self.experts.blocks, self._factors(self.x.dtype)
        for _ in range(ORDERS):
            order, y = torch.randperm(self.x.shape[1]), self.y.clone()
            for block, place in zip(blocks, places_of(blocks), strict=True):
                of_block = factors.of_block(block, place)
                gate, logits = of_block.gate_weight, of_block.gate_logits
                if logits is not None and of_block.gate_bias is not None:
                    of_block = of_block._replace(gate_logits=logits + of_block.gate_bias, gate_bias=None)
                gate = None if gate is None else gate[:, order]
                of_block = of_block._replace(lora_a=of_block.lora_a[:, :, order], gate_weight=gate)
                delta, _ = factored(self.x[:, order], of_block, block.options)
                if self.groups is not None:
                    scale = 1.0 if self.groups.scale is None else self.groups.scale[:, None]
                    delta = (delta * scale).where((self.groups.group == block.group)[:, None], 0.0)
                y[:, place.columns] += delta.to(y.dtype)
            results.append(y)
        return results

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
) -> Call:
    """Draw a call, without tokens for which a rounding could change the choice of experts."""
    experts = StackedExperts(blocks, features, dtype=dtype, gate_bias=True)
    for index, block in enumerate(blocks):
        for name, scale in (("lora_a", features), ("lora_b", block.rank), ("gate_weight", features), ("gate_bias", 1)):
            experts.fill(index, name, torch.randn(experts.part(index, name).shape) * scale**-0.5)
    pool = torch.randn(16 * tokens + 16, features, dtype=dtype)
    of_gates = pool.double() @ experts.gate_weight.double().T
    if outside:
        of_gates = torch.randn_like(of_gates)
    wide = torch.promote_types(dtype, torch.float32)
    of_gates = of_gates.to(wide)
    keep = _gaps(of_gates + experts.gate_bias, blocks).argsort(descending=True)[:tokens]
    columns = max(block.column + block.out_features for block in blocks)
    chosen = None
    if groups:
        numbers = torch.tensor(sorted({block.group for block in blocks} | {-1}))
        group = numbers[torch.randint(len(numbers), (tokens,))]
        chosen = TokenGroups(group.int() if "int" in groups else group, torch.rand(tokens) if "scale" in groups else None)
    y = torch.randn(tokens, columns, dtype=dtype)
    return Call(y, pool[keep], experts, of_gates[keep] if outside else None, chosen)


def _gaps(logits: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The smallest gap (T) between the last kept and the first dropped logit of any block."""
    gaps = torch.full((len(logits),), float("inf"), dtype=logits.dtype)
    for block, place in zip(blocks, places_of(tuple(blocks)), strict=True):
        if block.top_k is not None and block.top_k < block.num_experts:
            ordered = logits[:, place.experts].sort(dim=1, descending=True).values
            gaps = torch.minimum(gaps, ordered[:, block.top_k - 1] - ordered[:, block.top_k])
    return gaps


@pytest.mark.parametrize("groups", ["", "int", "with scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_every_backend_adds_what_the_definition_adds(
    name: str, dtype: torch.dtype, groups: str, backend: str, watch: AllocationWatch
) -> None:
    call = make_call(STACKS[name], dtype, tokens=13, groups=groups, outside=name == "one")
    assert_no_worse("y", call.run(backend), call.plain(), call.true())


@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 40])
def test_any_number_of_tokens(tokens: int, backend: str, exact: torch.dtype) -> None:
    call = make_call(MIXED, exact, tokens=tokens)
    assert_no_worse("y", call.run(backend), call.plain(), call.true())


def test_the_op_under_torch_compile() -> None:
    call = make_call(QKV, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(y: Tensor, x: Tensor) -> Tensor:
        call.experts.add_(y, x, backend="torch")
        return y * 2

    torch.testing.assert_close(run(call.y.clone(), call.x), 2 * call.run("torch"))
