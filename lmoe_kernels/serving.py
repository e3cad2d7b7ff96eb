# SPDX-License-Identifier: Apache-2.0
"""Serving: several mixtures of experts that read the same x, added to the output of a frozen layer in place.

The mixtures may be those of the modules of a fused layer (q, k and v), each with its own columns of y, and those of several
adapters, each for its own tokens. `StackedExperts` prepares their tensors once: packed, in one dtype, without gradients.
`lmoe_stacked_` adds them. There is no backward.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from lmoe_kernels import checks, dispatch, ops
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.options import Block, Problem, Sizes, StackedFactors, TokenGroups, places_of
from lmoe_kernels.tracing import constant_when_traced

_OP = "lmoe_stacked_"
_library = torch.library.Library("lmoe_kernels", "FRAGMENT")
_library.define(
    "add_stacked(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? gate_weight, Tensor? gate_bias,"
    " Tensor? gate_logits, Tensor? token_group, Tensor? token_scale, str blocks, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class StackedExperts(nn.Module):
    """The experts and gates of several mixtures that read the same x, packed for `lmoe_stacked_`.

    Semantics:
        for block in blocks:
            y[:, columns of block] += lmoe(x, lora_a, lora_b, gate_weight=gate_weight, ...)  # those of the block

    The tensors are parameters that require no gradient; `part` gives the part of one block, to be filled in place. They are
    0 at first. They have the given dtype. Most CPUs multiply fp32 faster: there they are rounded to it and kept in fp32.

    Args:
        blocks: the sizes, options and columns of every mixture.
        in_features: I, of all of them.
        dtype: of x.
        device: of x.
        gate_bias: whether a gate has a bias.

    Raises:
        ValueError: an option of a block does not fit.
        TypeError: an option of a block has the wrong type.

    Source: L-MoE, arXiv 2510.17898.
    """

    lora_a: Tensor  # (sum of E R, or R where A is shared, I)
    lora_b: Tensor  # (sum of E R O)
    gate_weight: Tensor  # (sum of E, I)
    gate_bias: Tensor | None  # (sum of E), fp32

    def __init__(
        self,
        blocks: Sequence[Block],
        in_features: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        gate_bias: bool = False,
    ) -> None:
        super().__init__()
        _check_blocks(blocks)
        if type(in_features) is not int or in_features < 0:
            checks.fail("StackedExperts", "in_features", "be an int of at least 0", repr(in_features))
        self.blocks, self.in_features = tuple(blocks), in_features
        self.layout = _layout_of(self.blocks)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        last = places_of(self.blocks)[-1]
        self.dtype, experts = dtype, last.experts.stop
        of_experts, of_gate = _kept_dtypes(dtype, torch.empty(0, device=device).device)
        wide = torch.promote_types(dtype, torch.float32)
        # On a CPU, whose only backend it is, torch.compile traces the ATen calls of the torch backend instead of one op, and
        # Inductor fuses all but the products. 8 tokens of a layer with I=1024 took 420 us instead of 780 (E=8, R=16, bf16,
        # Intel Xeon, 1 thread, busy, torch 2.13, 2026-11-26).
        self._to_trace = dispatch.load_serving("torch")

        def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.lora_a = parameter(last.a.stop, in_features, dtype=of_experts)
        self.lora_b = parameter(last.b.stop, dtype=of_experts)
        self.gate_weight = parameter(experts, in_features, dtype=of_gate)
        self.gate_bias = parameter(experts, dtype=wide) if gate_bias else None

    def part(self, index: int, name: str) -> Tensor:
        """The part of a block in one of the tensors, with the shape that `lmoe` documents for it: a view.

        Args:
            index: of the block.
            name: "lora_a", "lora_b", "gate_weight" or "gate_bias".

        Raises:
            ValueError: there is no such block, or no such tensor.
        """
        names = [key for key in ("lora_a", "lora_b", "gate_weight", "gate_bias") if getattr(self, key) is not None]
        if name not in names:
            checks.fail("StackedExperts.part", "name", f"be one of {', '.join(map(repr, names))}", repr(name))
        if not 0 <= index < len(self.blocks):
            checks.fail("StackedExperts.part", "index", f"be that of one of {len(self.blocks)} blocks", index)
        block, place = self.blocks[index], places_of(self.blocks)[index]
        of_block = self.factors(None).of_block(block, place)
        return getattr(of_block, name)

    def fill(self, index: int, name: str, value: Tensor) -> None:
        """Copy the tensor of a mixture into its part. Experts and gates are rounded to the dtype of x first, also where they
        are kept in fp32: a call of `lmoe` does so, and must choose the same experts.

        Raises:
            ValueError: the shape is not that of the part.
        """
        part = self.part(index, name)
        if value.shape != part.shape:
            checks.fail(
                "StackedExperts.fill", f"{name} of block {index}", f"have shape {tuple(part.shape)}", tuple(value.shape)
            )
        with torch.no_grad():
            part.copy_(value if name == "gate_bias" else value.to(self.dtype))

    def factors(self, gate_logits: Tensor | None) -> StackedFactors:
        """The tensors as a tuple, with the logits of an outside router in place of the gates if they are given."""
        gate_weight = self.gate_weight if gate_logits is None else None
        return StackedFactors(self.lora_a, self.lora_b, gate_weight, self.gate_bias, gate_logits)

    def add_(
        self,
        y: Tensor,
        x: Tensor,
        *,
        gate_logits: Tensor | None = None,
        token_group: Tensor | None = None,
        token_scale: Tensor | None = None,
        backend: str = dispatch.AUTO,
    ) -> None:
        """`lmoe_stacked_` without its checks, for callers that call often with the same shapes."""
        factors = self.factors(gate_logits)
        if is_dynamo_compiling() and token_group is None and backend in (dispatch.AUTO, "torch") and _is_plain_on_cpu(x):
            self._to_trace(y, x, factors, _constant_blocks(self.layout), None)
        elif ops.something_sees_ops(x, (y, x, token_group, token_scale, gate_logits)):
            add_stacked(y, x, *factors, token_group, token_scale, self.layout, backend)
        else:
            _compute(y, x, factors, token_group, token_scale, self.blocks, backend)


def lmoe_stacked_(
    y: Tensor,
    x: Tensor,
    experts: StackedExperts,
    *,
    gate_logits: Tensor | None = None,
    token_group: Tensor | None = None,
    token_scale: Tensor | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Add the deltas of several mixtures that read the same x to y, in place. No gradient is recorded.

    Semantics:
        for block in experts.blocks:
            delta = lmoe(x, lora_a, lora_b, gate_weight=gate_weight, ...)  # those of the block
            y[:, columns of block] += where(token_group == block.group, token_scale * delta, 0)

    Args:
        y: (T, N), x's dtype; rows may lie apart, numbers of a row may not. It is changed.
        x: (T, I), the dtype of the experts.
        experts: the mixtures.
        gate_logits: (T, sum of E), fp32 (fp64 for fp64): logits of all gates, block after block, in place of the products
            of x with the gates. The gates' biases are added to them.
        token_group: (T), int32 or int64: each token gets the blocks of its group, and none if no block has its number.
            None: every token gets every block.
        token_scale: (T), fp32: a factor on each token's delta; only with token_group.
        backend: as in `lmoe`.

    Returns:
        y.

    Raises:
        ValueError: a shape, a device or an option does not fit, or the named backend cannot take the call.
        TypeError: a type, a layout or a dtype is not supported.

    Example:
        experts = StackedExperts([Block(8, 16, 1024), Block(8, 16, 256, column=1024)], in_features=1024)
        lmoe_stacked_(qk, x, experts)

    Source: L-MoE, arXiv 2510.17898.
    """
    _check_call(y, x, experts, gate_logits, token_group, token_scale)
    name = dispatch.requested_backend(_OP, backend)
    experts.add_(y, x, gate_logits=gate_logits, token_group=token_group, token_scale=token_scale, backend=name)
    return y


def explain_stacked(x: Tensor, experts: StackedExperts, *, backend: BackendName | None = None) -> str:
    """Explain which backend `lmoe_stacked_` selects for these arguments, as `explain` does for `lmoe`."""
    problem = _problem(x, experts.blocks)
    return dispatch.explain_choice(_OP, problem, dispatch.requested_backend("explain_stacked", backend))


def _check_blocks(blocks: Sequence[Block]) -> None:
    op = "StackedExperts"
    if not blocks:
        checks.fail(op, "blocks", "have one block or more", "none")
    for block in blocks:
        if not isinstance(block, Block):
            checks.fail(op, "blocks", "be several Block", type(block).__name__, TypeError)
        for name in ("num_experts", "rank", "out_features"):
            checks.check_positive_int(op, name, getattr(block, name))
        for name in ("column", "group"):
            if type(number := getattr(block, name)) is not int:
                checks.fail(op, name, "be an int", type(number).__name__, TypeError)
        if block.column < 0:
            checks.fail(op, "column", "be at least 0", block.column)
        if not -(2**63) <= block.group < 2**63:
            checks.fail(op, "group", "fit an int64", block.group)
        checks.check_bool(op, "shared_a", block.shared_a)
        checks.check_finite(op, "scaling", block.scaling, "be a finite number")
        checks.check_options(op, block.num_experts, block.options)


def _check_call(
    y: Tensor,
    x: Tensor,
    experts: StackedExperts,
    gate_logits: Tensor | None,
    token_group: Tensor | None,
    token_scale: Tensor | None,
) -> None:
    checks.check_dense(_OP, "x", x)
    if x.dim() != 2:
        checks.fail(_OP, "x", "have shape (T, I)", tuple(x.shape))
    tokens, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    checks.check_shape(_OP, "x", x, "(T, I)", (tokens, experts.in_features))
    if x.dtype != experts.dtype:
        checks.fail(_OP, "x", f"have dtype {experts.dtype} like the experts", x.dtype, TypeError)
    checks.check_device(_OP, "lora_a", experts.lora_a, x)
    checks.check_like(_OP, "y", y, x)
    columns = max(place.columns.stop for place in places_of(experts.blocks))
    if y.dim() != 2 or y.shape[0] != tokens or y.shape[1] < columns:
        checks.fail(_OP, "y", f"have shape (T, N) = ({tokens}, {columns} or more)", tuple(y.shape))
    if y.numel() and (y.stride(1) != 1 or (tokens > 1 and y.stride(0) < y.shape[1])):
        checks.fail(_OP, "y", "have contiguous rows that do not overlap", f"strides {y.stride()}")
    if gate_logits is not None:
        checks.check_dense(_OP, "gate_logits", gate_logits, (wide,))
        checks.check_device(_OP, "gate_logits", gate_logits, x)
        checks.check_shape(_OP, "gate_logits", gate_logits, "(T, E)", (tokens, experts.gate_weight.shape[0]))
    if token_scale is not None and token_group is None:
        checks.fail(_OP, "token_scale", "be None unless token_group is given", type(token_scale).__name__)
    for name, tensor, dtypes in (
        ("token_group", token_group, (torch.int32, torch.int64)),
        ("token_scale", token_scale, (torch.float32,)),
    ):
        if tensor is not None:
            checks.check_dense(_OP, name, tensor, dtypes)
            checks.check_device(_OP, name, tensor, x)
            checks.check_shape(_OP, name, tensor, "(T)", (tokens,))


def _layout_of(blocks: tuple[Block, ...]) -> str:
    """The blocks as text, the form in which a graph of torch.compile holds them."""
    return json.dumps(blocks, separators=(",", ":"))


@lru_cache(4096)
def _blocks_of(layout: str) -> tuple[Block, ...]:
    return tuple(Block(*fields) for fields in json.loads(layout))


def _constant_blocks(layout: str) -> tuple[Block, ...]:
    return _blocks_of(layout)


constant_when_traced(_constant_blocks)  # torch.compile does not trace a cache


def _is_plain_on_cpu(x: Tensor) -> bool:
    """Whether ATen calls with x on a CPU mean what they mean in the op, which disables autograd and autocast."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _kept_dtypes(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which experts and gates are kept for products with x.

    A CPU rounds the results of products of 16-bit matrices, so gates are kept in fp32. Without matrix tiles (AMX), its
    products of fp32 matrices are faster, too: 1.3 times at 1 token, 1.7 times at 400 (Intel Xeon with AVX-512 BF16, 1
    thread, torch 2.13, 2026-11-26). So experts are kept in fp32 there. With tiles nothing was measured.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if device.type != "cpu":
        return dtype, dtype
    return dtype if torch.cpu._is_amx_tile_supported() else wide, wide


def _problem(x: Tensor, blocks: tuple[Block, ...]) -> Problem:
    """What the choice of a backend depends on: the experts and the rank of the largest block, the columns of all blocks."""
    experts, rank = max(block.num_experts for block in blocks), max(block.rank for block in blocks)
    columns = sum(block.out_features for block in blocks)
    return Problem(Sizes(x.shape[0], x.shape[1], columns, experts, rank, experts), x.dtype, x.device, stacked=True)


def _compute(
    y: Tensor,
    x: Tensor,
    factors: StackedFactors,
    token_group: Tensor | None,
    token_scale: Tensor | None,
    blocks: tuple[Block, ...],
    backend: str,  # a name or "auto"
) -> None:
    """Let the backend add; it is chosen here, from the actual sizes."""
    if y.numel() == 0 or x.numel() == 0:  # without features every delta is 0
        return
    name = dispatch.choose(_OP, _problem(x, blocks), backend)
    if factors.lora_a.dtype != x.dtype and name not in ("torch", "reference"):  # kernels of GPUs, interpreted on a CPU
        factors = factors._replace(lora_a=factors.lora_a.to(x.dtype), lora_b=factors.lora_b.to(x.dtype))
    groups = None if token_group is None else TokenGroups(token_group.contiguous(), token_scale)
    with ops.no_autocast_or_autograd(x):
        dispatch.load_serving(name)(y, ops.with_contiguous_rows(x), factors, blocks, groups)


def _op(*args: Any) -> None:
    y, x, a, b, gate, bias, logits, group, scale, layout, backend = args
    _compute(y, x, StackedFactors(a, b, gate, bias, logits), group, scale, _blocks_of(layout), backend)


def _fake(*args: object) -> None:
    """Nothing is returned; the schema says that y changes."""


add_stacked = torch.ops.lmoe_kernels.add_stacked.default
for _key in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("add_stacked", _op, _key)
torch.library.register_fake("lmoe_kernels::add_stacked", _fake, lib=_library)
