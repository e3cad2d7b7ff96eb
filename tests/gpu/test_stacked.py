"""Several mixtures added in place on a GPU: the error rule, broken adapters, CUDA graphs with groups that change."""

import pytest
import torch

from lmoe_kernels import dispatch
from lmoe_kernels.dispatch import BACKENDS
from lmoe_kernels.options import Block, Problem, Sizes
from tests.serving import ADAPTERS, MIXED, Call, make_call, of_adapters
from tools.error_rule import assert_no_worse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

OF_LAYER = [Block(8, 16, 1024), Block(8, 16, 256, column=1024), Block(8, 16, 256, column=1280)]
OF_ADAPTERS = of_adapters(OF_LAYER, 12)
GROUPS = "int, with scale"
STACKS = {"layer": (OF_LAYER, ""), "adapters": (OF_ADAPTERS, GROUPS), "small": (ADAPTERS, GROUPS), "odd": (MIXED, "")}
TOKENS = [1, 70, 2000]  # few numbers, since kernels are compiled for each


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here."""
    problem = Problem(Sizes(1, 1, 1, 1, 1, 1), torch.bfloat16, torch.device("cuda", 0))
    reason = BACKENDS[request.param].why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    dispatch.load_serving(request.param)
    return request.param


def _judge(call: Call, backend: str, before: int) -> None:
    true = call.in_plain_pytorch(torch.float64, torch.arange(call.x.shape[1], device="cuda"))
    assert_no_worse("y", call.run(backend, before), call.plain(), true)


@pytest.mark.parametrize(
    "name, tokens", [*(("layer", t) for t in TOKENS), *(("adapters", t) for t in TOKENS), ("small", 13), ("odd", 70)]
)
def test_no_worse_than_plain_pytorch(name: str, tokens: int, backend: str) -> None:
    """With y at an address that is a multiple of 16."""
    blocks, groups = STACKS[name]
    _judge(make_call(blocks, torch.bfloat16, tokens, 1024, groups=groups, device="cuda"), backend, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    """With y at an address that is no multiple of 16."""
    _judge(make_call(OF_LAYER, dtype, 70, 1024, groups="int", device="cuda"), backend, 2)


def test_an_outside_router(backend: str) -> None:
    _judge(make_call(OF_LAYER, torch.bfloat16, 70, 1024, outside=True, device="cuda"), backend, 16)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_broken_adapter_reaches_the_tokens_of_its_group_alone(tokens: int, backend: str) -> None:
    call = make_call(OF_ADAPTERS, torch.bfloat16, tokens, 1024, groups=GROUPS, device="cuda")
    assert call.groups is not None
    foreign, whole = call.groups.group == 1, call.run(backend)
    for index in range(3, 6):
        for name in ("lora_a", "lora_b", "gate_weight", "gate_bias"):
            call.experts.part(index, name).fill_(float("nan"))
    call.x[foreign] = float("nan")
    assert torch.equal(call.run(backend)[~foreign], whole[~foreign])


@pytest.mark.parametrize("tokens", TOKENS)
def test_in_a_graph_whose_groups_change(tokens: int, backend: str) -> None:
    """A replay reads x, groups and scales anew; it allocates nothing, and does not wait for the host."""
    call = make_call(OF_ADAPTERS, torch.bfloat16, tokens, 1024, groups=GROUPS, device="cuda")
    assert call.groups is not None
    group, scale, y = *call.groups, call.y.clone()
    assert scale is not None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.add(y, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.add(y, backend)
    for _ in range(3):
        call.x.normal_()
        group.copy_(torch.randint(-1, 12, group.shape, device="cuda"))
        scale.uniform_()
        y.copy_(call.y)
        graph.replay()
        assert torch.equal(y, call.add(call.y.clone(), backend))
