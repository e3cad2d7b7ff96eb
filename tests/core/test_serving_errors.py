"""Bad input of `lmoe_stacked_` and `StackedExperts`: one line that names the argument, and y stays as it was."""

from typing import Any

import pytest
import torch

from lmoe_kernels.options import Block
from lmoe_kernels.serving import StackedExperts, lmoe_stacked_

GOOD = Block(4, 3, 8)
BF16 = torch.bfloat16


def _call(**changes: Any) -> torch.Tensor:
    experts = StackedExperts([GOOD, GOOD._replace(column=8)], 6, gate_bias=True)
    return lmoe_stacked_(**{"y": torch.zeros(5, 16), "x": torch.randn(5, 6), "experts": experts} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(6)}, ValueError, r"x must have shape \(T, I\), got \(6,\)"),
        ({"x": torch.zeros(5, 7)}, ValueError, r"x must have shape \(T, I\) = \(5, 6\), got \(5, 7\)"),
        (
            {"x": torch.zeros(5, 6, dtype=BF16)},
            TypeError,
            "x must have dtype torch.float32 like the experts, got torch.bfloat16",
        ),
        ({"y": torch.zeros(5, 16, dtype=BF16)}, TypeError, "y must have dtype torch.float32.*, got torch.bfloat16"),
        ({"y": torch.zeros(5, 15)}, ValueError, r"y must have shape \(T, N\) = \(5, 16 or more\), got \(5, 15\)"),
        ({"y": torch.zeros(4, 16)}, ValueError, r"y must have shape \(T, N\) = \(5, 16 or more\), got \(4, 16\)"),
        ({"y": torch.zeros(16, 5).T}, ValueError, "y must have contiguous rows that do not overlap, got strides"),
        (
            {"y": torch.zeros(1, 16).expand(5, 16)},
            ValueError,
            "y must have contiguous rows that do not overlap, got strides",
        ),
        ({"gate_logits": torch.zeros(5, 7)}, ValueError, r"gate_logits must have shape \(T, E\) = \(5, 8\), got \(5, 7\)"),
        ({"gate_logits": torch.zeros(5, 8, dtype=BF16)}, TypeError, "gate_logits must have one of the dtypes torch.float32"),
        ({"token_group": torch.zeros(5)}, TypeError, "token_group must have one of the dtypes torch.int32, torch.int64"),
        ({"token_group": torch.zeros(4, dtype=torch.int32)}, ValueError, r"token_group must have shape \(T\) = \(5,\)"),
        ({"token_scale": torch.ones(5)}, ValueError, "token_scale must be None unless token_group is given, got Tensor"),
        (
            {"token_group": torch.zeros(5, dtype=torch.int32), "token_scale": torch.ones(5, dtype=BF16)},
            TypeError,
            "token_scale",
        ),
        ({"x": torch.zeros(5, 6, device="meta")}, ValueError, "lora_a must be on meta like x, got cpu"),
        ({"gate_logits": torch.zeros(5, 8, device="meta")}, ValueError, "gate_logits must be on cpu like x, got meta"),
        (
            {"token_group": torch.zeros(5, dtype=torch.int32, device="meta")},
            ValueError,
            "token_group must be on cpu like x, got meta",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be None or one of"),
    ],
)
def test_a_call(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    y = changes.setdefault("y", torch.randn(5, 16))
    before = y.clone()
    with pytest.raises(error, match=f"^lmoe_stacked_: {message}") as caught:
        _call(**changes)
    assert "\n" not in str(caught.value)
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([], ValueError, "blocks must have one block or more, got none"),
        ([(4, 3, 8)], TypeError, "blocks must be several Block, got tuple"),
        ([GOOD._replace(num_experts=0)], ValueError, "num_experts must be at least 1, got 0"),
        ([GOOD._replace(rank=2.0)], TypeError, "rank must be an int, got float"),
        ([GOOD._replace(out_features=-1)], ValueError, "out_features must be at least 1, got -1"),
        ([GOOD._replace(column=-1)], ValueError, "column must be at least 0, got -1"),
        ([GOOD._replace(column=True)], TypeError, "column must be an int, got bool"),
        ([GOOD._replace(group="a")], TypeError, "group must be an int, got str"),
        ([GOOD._replace(group=2**63)], ValueError, "group must fit an int64, got 9223372036854775808"),
        ([GOOD._replace(shared_a=1)], TypeError, "shared_a must be a bool, got int"),
        ([GOOD._replace(scaling="1")], TypeError, "scaling must be a finite number, got str"),
        ([GOOD._replace(mixing="mean")], ValueError, "mixing must be one of 'factors', 'outputs', got 'mean'"),
        ([GOOD._replace(top_k=5)], ValueError, "top_k must be in 1 .. E = 4, got 5"),
    ],
)
def test_blocks(blocks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^StackedExperts: {message}$"):
        StackedExperts(blocks, 6)


def test_sizes_and_parts() -> None:
    for features in (-1, 6.0):
        with pytest.raises(ValueError, match=f"^StackedExperts: in_features must be an int of at least 0, got {features}$"):
            StackedExperts([GOOD], features)  # pyright: ignore[reportArgumentType]
    experts = StackedExperts([GOOD], 6)
    for name in ("gate_bias", "weight"):
        message = f"name must be one of 'lora_a', 'lora_b', 'gate_weight', got '{name}'"
        with pytest.raises(ValueError, match=rf"^StackedExperts\.part: {message}$"):
            experts.part(0, name)
    for index in (-1, 1):
        with pytest.raises(ValueError, match=rf"^StackedExperts\.part: index must be that of one of 1 blocks, got {index}$"):
            experts.part(index, "lora_a")
    message = r"lora_b of block 0 must have shape \(4, 3, 8\), got \(4, 3, 9\)"
    with pytest.raises(ValueError, match=rf"^StackedExperts\.fill: {message}$"):
        experts.fill(0, "lora_b", torch.zeros(4, 3, 9))
