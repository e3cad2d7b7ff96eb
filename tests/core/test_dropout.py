"""Dropout of the rows that lora_a sees: gradients, what is saved, checkpoints and compiled functions, bad input."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lmoe_kernels import LMoELinear, lmoe
from tests.problems import (
    CASES,
    Case,
    Problem,
    assert_all_no_worse,
    good_arguments,
    leaves_of,
    make_problem,
    outcome,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# No tokens, one token; a gate with a bias, outside logits; mixtures of outputs, experts that are dropped, a shared A.
WITH_DROPOUT = [
    replace(case, dropout=0.1 + 0.1 * i) for i, case in enumerate((*CASES[:4], *CASES[8:11], CASES[14], CASES[18]))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WITH_DROPOUT, ids=str)
def test_results_are_no_worse_than_plain_pytorch(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    """With the mask of `reference.keep_mask`, whatever the backend."""
    _compare(make_problem(case, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [WITH_DROPOUT[0], WITH_DROPOUT[4], replace(WITH_DROPOUT[8], T=80)], ids=str)
def test_fp32_parameters_get_fp32_gradients(case: Case, dtype: torch.dtype, backend: str, watch) -> None:
    leaves = _compare(make_problem(case, dtype, param_dtype=torch.float32), backend)
    assert {leaves[name].dtype for name in ("lora_a", "lora_b")} == {torch.float32}


@pytest.mark.parametrize(
    "case",
    [
        Case(T=35, gate_bias=True, dropout=0.5),
        Case(T=5, E=6, top_k=2, dropout=0.5),
        Case(T=5, outside_logits=True, softmax=False, dropout=0.5),
    ],
    ids=str,
)
def test_every_plan(case: Case, every_plan: str, watch) -> None:
    _compare(make_problem(case, torch.bfloat16), every_plan)


def _compare(problem: Problem, backend: str) -> dict[str, torch.Tensor]:
    leaves = leaves_of(problem.tensors)
    ours = outcome(problem, problem.call(backend, **leaves), leaves)
    assert_all_no_worse(problem, ours)
    return ours


def test_the_gate_sees_all_of_x(backend: str, exact: torch.dtype) -> None:
    """Where dropout leaves next to nothing of what lora_a sees, the router logits stay what they are without it."""
    problem = make_problem(Case(dropout=0.999), exact)
    without = replace(problem, case=replace(problem.case, dropout=0.0))
    torch.testing.assert_close(problem.call(backend)[1], without.call(backend)[1])


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("trained", [("lora_b",), ("lora_a", "lora_b"), ("x", "lora_a", "lora_b", "gate_weight")], ids=str)
def test_the_mask_is_not_saved(trained: tuple[str, ...], top_k: int | None, backend: str) -> None:
    """Eight bytes are, the seed."""
    problem = make_problem(Case(T=64, I=48, O=40, E=8, R=16, top_k=top_k), torch.bfloat16)
    leaves = {name: t.requires_grad_(name in trained) for name, t in problem.tensors.items()}
    without = _saved_bytes(lambda: lmoe(**leaves, top_k=top_k, backend=backend))
    assert _saved_bytes(lambda: lmoe(**leaves, top_k=top_k, backend=backend, dropout=0.5)) == without + 8


def _saved_bytes(call: Callable[[], object]) -> int:
    saved: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = call()  # noqa: F841 (what it saves must live until it is counted)
    return sum(saved.values())


def _layer(dropout: float = 0.5) -> LMoELinear:
    """A layer of which lora_a, lora_b and the gate pass on what they see."""
    layer = LMoELinear(48, 40, num_experts=3, rank=4, dropout=dropout)
    torch.nn.init.normal_(layer.lora_b)
    return layer


def test_a_layer_has_dropout_in_training_alone() -> None:
    layer, x = _layer(), torch.randn(6, 48)
    assert not torch.equal(layer(x), layer(x)), "each call has a mask of its own"
    layer.eval()
    evaluated = layer(x)
    assert torch.equal(layer(x), evaluated)
    layer.dropout = 0.0
    assert torch.equal(layer.train()(x), evaluated)


def test_the_generator_of_pytorch_decides_the_mask() -> None:
    layer, x = _layer(), torch.randn(6, 48)
    first, second, other = (layer(x) for seed in (5, 5, 6) if torch.manual_seed(seed))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpoint_computes_the_same_mask_again(reentrant: bool) -> None:
    """The mask is another one if the generator's state is not restored, so that the comparison sees it."""
    layers = torch.nn.ModuleList([_layer(), LMoELinear(40, 40, num_experts=3, rank=4, dropout=0.5)])
    torch.nn.init.normal_(layers[1].lora_b)
    x, seed = torch.randn(6, 48, requires_grad=True), int(torch.randint(1 << 31, ()))

    def block(x: torch.Tensor) -> torch.Tensor:
        return layers[1](layers[0](x))

    def grads(call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x, *(p for p in layers.parameters() if p.requires_grad)]
        torch.manual_seed(seed)
        loss = call(x).square().sum()
        torch.randn(3)  # the generator moves on between forward and backward
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def checkpointed(restores: bool) -> list[torch.Tensor]:
        return grads(lambda x: checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=restores))  # pyright: ignore[reportReturnType]

    expected = grads(block)
    assert len(expected) == 7
    assert all(map(torch.equal, checkpointed(restores=True), expected))
    assert not any(map(torch.equal, checkpointed(restores=False), expected))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_function_draws_a_mask_in_each_call(compiler: str) -> None:
    """One expert, whose A and B are the identity: y and its gradient show the mask."""
    torch._dynamo.reset()
    (a, b), x, outside = (torch.eye(32)[None] for _ in range(2)), torch.ones(8, 32, requires_grad=True), torch.zeros(8, 1)

    @torch.compile(fullgraph=True, backend=compiler)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return lmoe(x, a, b, gate_logits=outside, dropout=0.5) * 1.0

    def run(seed: int | None = None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert set(y.detach().unique().tolist()) == {0.0, 2.0}
        assert torch.equal(dx, y.detach()), "the backward has another mask than the forward"
        return y.detach()

    first, second = run(seed=7), run()
    assert not torch.equal(first, second)
    assert torch.equal(run(seed=7), first)
    assert torch.equal(run(), second)


MUST = "dropout must be a number of at least 0 and below 1, got"
BAD = [
    ({"dropout": 1.0}, ValueError, f"{MUST} 1.0"),
    ({"dropout": -0.1}, ValueError, f"{MUST} -0.1"),
    ({"dropout": float("nan")}, ValueError, f"{MUST} nan"),
    ({"dropout": "0.1"}, TypeError, f"{MUST} str"),
    ({"dropout": None}, TypeError, f"{MUST} NoneType"),
    ({"dropout": 0.5, "seed": 7}, TypeError, "seed must be a torch.Tensor, got int"),
    ({"dropout": 0.5, "seed": torch.tensor([7])}, ValueError, "seed must have shape () = (), got (1,)"),
    (
        {"dropout": 0.5, "seed": torch.tensor(7, dtype=torch.int32)},
        TypeError,
        "seed must have one of the dtypes torch.int64, got torch.int32",
    ),
    (
        {"dropout": 0.5, "seed": torch.zeros((), dtype=torch.int64, device="meta")},
        ValueError,
        "seed must be on cpu like x, got meta",
    ),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_input_gets_one_line(changes: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        lmoe(**good_arguments(**changes))
    assert str(caught.value) == f"lmoe: {text}"
    if "seed" not in changes:
        with pytest.raises(error) as caught:
            LMoELinear(8, 8, **changes)
        assert str(caught.value) == f"LMoELinear: {text}"
