"""The plans of the forward of few tokens, which warps share a row, and long sums; the kernel runs on the emulator."""

import pytest
import torch

from lmoe_kernels.backends.cuda import configs, extension, forward
from tests.problems import Case, assert_all_no_worse, make_problem
from tools import calls
from tools.error_rule import assert_no_worse

H100 = extension.Device(132, 227 << 10, cooperative=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("features", "columns", "chunks"),
    [(4096, 136, 4), (4096, 265, 2), (4095, 136, 2), (8192, 132, 8), (8192, 133, 4), (4096, 1040, 1), (0, 8, 1)],
)
def test_the_warps_that_share_a_row(features: int, columns: int, chunks: int) -> None:
    plan = configs.decode_plan(1, features, 4096, 1, 1, columns, False, 2, H100)
    assert plan is not None
    assert plan.chunks == chunks


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9, 16])
def test_every_number_of_warps_a_row(tokens: int, chunks: int, emulated_cuda, monkeypatch, watch) -> None:
    """More rows than the blocks take at once, the last block with fewer; the last chunk incomplete, or empty."""
    plan = configs.decode_plan
    monkeypatch.setattr(
        forward, "decode_plan", lambda *sizes: plan(*sizes)._replace(blocks=2, chunk=2048 // chunks, chunks=chunks)
    )
    for features in (1992, 1024):
        problem = make_problem(Case(T=tokens, I=features, O=20, E=3, R=6), torch.bfloat16)
        y, logits = problem.call("cuda")
        assert_all_no_worse(problem, {"y": y, "router_logits": logits})


@pytest.mark.parametrize("shape", [(44,), (16, 44), (16, 56)], ids=["vector", "rows", "rows apart"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_the_base_is_added(tokens: int, shape: tuple[int, ...], emulated_cuda, monkeypatch, watch) -> None:
    """It is copied to shared memory with each tile of columns, of which a block here has two."""
    plan = configs.decode_plan
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: plan(*sizes)._replace(blocks=2))
    problem = make_problem(Case(T=tokens, I=40, O=44, E=3, R=6), torch.float32)
    base = torch.randn(shape)[..., :44]
    base = base if base.dim() == 1 else base[:tokens]

    def y(backend: str, dtype: torch.dtype) -> torch.Tensor:
        t = {name: tensor.to(dtype) for name, tensor in problem.tensors.items()}
        return calls.forward(backend, t["x"], calls.factors_of(t), base=base.to(dtype), save=False)[0]

    assert_no_worse("y", y("cuda", torch.float32), [y("reference", torch.float32)], y("reference", torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [20_000, 20_003], ids=["vectors", "anywhere"])
def test_long_sums(features: int, dtype: torch.dtype, emulated_cuda, monkeypatch, watch) -> None:
    """All features in one warp."""
    plan = configs.decode_plan
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: plan(*sizes)._replace(chunk=20_224, chunks=1))
    problem = make_problem(Case(T=2, I=features, O=8, E=2, R=2), dtype)
    y, logits = problem.call("cuda")
    assert_all_no_worse(problem, {"y": y, "router_logits": logits})


@pytest.mark.parametrize("plan", [(256, 3), (256, 16), (256, 0), (256, 1)], ids=str)
def test_a_plan_that_does_not_cover_the_features_is_refused(plan: tuple[int, int], emulated_cuda, monkeypatch) -> None:
    good = configs.decode_plan
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: good(*sizes)._replace(chunk=plan[0], chunks=plan[1]))
    with pytest.raises(RuntimeError, match=r"decode_fwd_kernel: .* share out the work differently"):
        make_problem(Case(T=2, I=264), torch.bfloat16).call("cuda")


def test_more_tokens_than_decode_takes_are_refused(emulated_cuda, monkeypatch) -> None:
    monkeypatch.setattr(configs, "DECODE_TOKENS", 17)
    monkeypatch.setattr(forward, "decode_plan", configs.decode_plan.__wrapped__)
    with pytest.raises(RuntimeError, match=r"decode_fwd_kernel: .* share out the work differently"):
        make_problem(Case(T=17), torch.bfloat16).call("cuda")
