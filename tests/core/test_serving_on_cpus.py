"""Several mixtures added to y in place on a CPU: what torch.compile traces, how experts are kept, many tokens."""

import pytest
import torch
from torch import Tensor

from lmoe_kernels.backends.torch import serving
from lmoe_kernels.options import Block, TokenGroups
from tests.serving import ADAPTERS, MIXED, STACKS, assert_isolated, make_call
from tools.error_rule import assert_no_worse


@pytest.mark.parametrize("groups", ["", "with scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qkv", "mixed"])
def test_under_torch_compile(name: str, dtype: torch.dtype, groups: str) -> None:
    """Graphs hold ATen calls, or the op where mixtures are for some of the tokens. They take any number of tokens."""
    torch._dynamo.reset()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype]
    graphs: list[torch.fx.GraphModule] = []
    call = make_call(STACKS[name], dtype, groups=groups)

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=keep)
    def run(y: Tensor, x: Tensor, groups: TokenGroups | None) -> Tensor:
        group, scale = groups or (None, None)
        call.experts.add_(y, x, token_group=group, token_scale=scale)
        return y * 2

    for one in (call, make_call(STACKS[name], dtype, tokens=300, groups=groups)._replace(experts=call.experts)):
        with torch.no_grad():
            result = run(one.y.clone(), one.x, one.groups)
        torch.testing.assert_close(result, 2 * one.run("torch"), rtol=tolerance, atol=tolerance)
    [graph] = graphs
    assert ("add_stacked" in graph.code) == bool(groups)

    with torch.autocast("cpu"), torch.no_grad():  # the op ignores it
        torch.testing.assert_close(
            run(call.y.clone(), call.x, call.groups), 2 * call.run("torch"), rtol=tolerance, atol=tolerance
        )
    x = call.x.clone().requires_grad_()
    assert not run(call.y.clone(), x, call.groups).requires_grad


def test_gates_that_do_not_sum_to_one_over_a_shared_a(backend: str, exact: torch.dtype) -> None:
    call = make_call([Block(5, 3, 16, shared_a=True, top_k=2, renormalize=False, scaling=0.5)], exact)
    assert_no_worse("y", call.run(backend), call.plain(), call.true())


def test_more_tokens_than_are_computed_at_once(exact: torch.dtype) -> None:
    for groups in ("", "with scale"):
        call = make_call(ADAPTERS[:4], exact, tokens=1000, groups=groups)
        assert_no_worse("y", call.run("torch"), call.plain(), call.true())


@pytest.mark.parametrize("has_tiles", [False, True])
def test_the_dtype_in_which_a_cpu_keeps_experts(has_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    call = make_call(MIXED, torch.bfloat16)
    experts = call.experts
    assert experts.lora_a.dtype is experts.lora_b.dtype is (torch.bfloat16 if has_tiles else torch.float32)
    assert experts.gate_weight.dtype is torch.float32
    for name in ("lora_a", "lora_b", "gate_weight"):  # rounded, so that they are those of a call of lmoe
        experts.fill(1, name, torch.randn(experts.part(1, name).shape))
        assert torch.equal(experts.part(1, name), experts.part(1, name).bfloat16())
    assert_no_worse("y", call.run("torch"), call.plain(), call.true())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_where_tokens_cannot_be_selected(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where every token meets the experts of every group."""
    monkeypatch.setattr(serving, "_may_wait", lambda x: False)
    assert_isolated(value, "torch", torch.float64)
    call = make_call(ADAPTERS, torch.float64, groups="with scale")
    assert_no_worse("y", call.run("torch"), call.plain(), call.true())
