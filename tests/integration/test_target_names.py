"""What a target means: a whole name, the end of one at a dot, or a regular expression for a whole name."""

import pytest
from torch import nn

from lmoe_kernels import apply_lmoe


def _model() -> nn.Module:
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "proj", "out_proj_2")})
    return nn.ModuleDict({"first": block, "proj2": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("proj", ["first.proj"]),
        ("first.proj", ["first.proj"]),
        (".*proj", ["first.q_proj", "first.proj"]),
        ("proj.?", ["proj2"]),
        ("first.*", ["first.q_proj", "first.proj", "first.out_proj_2"]),
    ],
)
def test_targets_match_whole_names_or_their_ends_at_a_dot(target: str, names: list[str]) -> None:
    assert apply_lmoe(_model(), target, num_experts=2, rank=2) == names


@pytest.mark.parametrize("target", ["roj", "first", "q_pro", "rst.proj", "proj_"])
def test_parts_of_names_match_nothing(target: str) -> None:
    with pytest.raises(ValueError, match="target_modules must match linear layers of the model, got"):
        apply_lmoe(_model(), target, num_experts=2, rank=2)
