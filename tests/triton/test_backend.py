"""What only the Triton backend has: several plans for one call, tiles that do not fit, the policy of tf32."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lmoe_kernels import dispatch, explain, lmoe
from lmoe_kernels.backends.triton import availability, configs
from lmoe_kernels.backends.triton.host import dot_constants
from lmoe_kernels.backends.triton.plans import Chip
from lmoe_kernels.options import Problem, Sizes
from tests import plans
from tests.problems import Case, assert_all_no_worse, leaves_of, make_problem, outcome
from tests.triton.chips import CHIPS, H200
from tools.interpreter.races import race_checked

CASES = [
    Case(T=70, I=300, O=290, E=4, R=6, top_k=2),
    Case(T=70, I=260, O=257, E=12, R=7),  # more columns than a tile of the interpreter holds
    Case(T=110, I=40, O=50, E=12, R=22, top_k=2),  # tokens are grouped by expert
    Case(T=110, I=40, O=50, E=12, R=22, top_k=2, mixing="outputs", outside_logits=True),
    Case(T=35, I=150, O=140, E=3, R=70, mixing="outputs"),  # more ranks than a block of the mix holds
    Case(T=35, I=150, O=140, E=70, R=2, shared_a=True, top_k=5),  # more experts than a block of expand or wgrad holds
    Case(T=110, I=40, O=50, E=12, R=22, top_k=2, renormalize=False),
    Case(T=110, I=40, O=50, E=12, R=22, top_k=1, renormalize=False, mixing="outputs", outside_logits=True),
    Case(T=40, I=150, O=140, E=5, R=3, top_k=3, renormalize=False, shared_a=True),
    Case(T=35, I=300, O=41, E=12, R=3, gate_bias=True),  # many processors split I
    Case(T=110, I=40, O=50, E=12, R=22, top_k=2, gate_bias=True),  # tokens are grouped by expert
    Case(T=35, I=150, O=140, E=12, R=3, shared_a=True, gate_bias=True),  # two kernels: a shared A
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
@pytest.mark.parametrize("plan", ["few processors", "many processors"])
def test_every_plan(plan: str, number: int, monkeypatch: pytest.MonkeyPatch, watch) -> None:
    """Each case under each plan, one of them in fp32 and the other in bf16, in turn."""
    case, dtype = CASES[number], (torch.float32, torch.bfloat16)[(number + (plan == "few processors")) % 2]
    plans.force("triton", plan, monkeypatch)
    problem = make_problem(case, dtype)
    leaves = leaves_of(problem.tensors)
    with race_checked():
        ours = outcome(problem, problem.call("triton", **leaves), leaves)
    assert_all_no_worse(problem, ours)


@pytest.mark.parametrize("plan", ["few processors", "many processors"])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=3, I=4, O=5, E=3, R=2, top_k=2),
        Case(T=3, I=4, O=5, E=3, R=2, top_k=2, renormalize=False),
        Case(T=3, I=4, O=5, E=3, R=2, mixing="outputs"),
        Case(T=3, I=4, O=5, E=3, R=2, gate_bias=True),
    ],
    ids=str,
)
def test_gradcheck(plan: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plans.force("triton", plan, monkeypatch)
    leaves = leaves_of(make_problem(case, torch.float64).tensors)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(leaves, tensors, strict=True))
        options = {"mixing": case.mixing, "top_k": case.top_k, "renormalize": case.renormalize}
        return lmoe(**named, scaling=0.3, **options, return_router_logits=True, backend="triton")

    torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


def test_fp32_is_rounded_to_tf32_only_where_the_user_lets_pytorch_do_so() -> None:
    products, x = torch.backends.cuda.matmul, torch.empty(1)
    assert dot_constants(x)["PRECISION"] == "ieee"
    try:
        products.allow_tf32 = True
        assert dot_constants(x)["PRECISION"] == "tf32"
        for other in (torch.bfloat16, torch.float16, torch.float64):
            assert dot_constants(x.to(other))["PRECISION"] == "ieee"
    finally:
        products.allow_tf32 = False


@pytest.mark.parametrize("arch, precision", [("sm_90", "tf32"), ("gfx942", "tf32"), ("gfx90a", "ieee"), ("gfx950", "ieee")])
def test_no_tf32_where_triton_has_none(arch: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans.set_chip(Chip(arch, 104, 64 << 10), monkeypatch)
    products = torch.backends.cuda.matmul
    try:
        products.allow_tf32 = True
        assert dot_constants(torch.empty(1))["PRECISION"] == precision
    finally:
        products.allow_tf32 = False


def test_plans_are_chosen_by_sizes_alone_and_fit_their_chip() -> None:
    for chip in CHIPS:
        for dtype in (torch.bfloat16, torch.float32):
            for E, R in ((1, 1), (5, 3), (8, 16), (8, 32), (64, 16), (256, 4), (2, 300)):
                for T in (0, 1, 16, 300, 8192, 200_000):
                    sizes = Sizes(T, 4096, 1000, E, R, E)
                    forward, backward = (plan(sizes, dtype, chip) for plan in (configs.forward_plan, configs.backward_plan))
                    assert forward == configs.forward_plan.__wrapped__(sizes, dtype, chip)
                    wgrad = configs.wgrad_plan(T, 4096, (E * R, E), dtype, chip)
                    assert wgrad.splits * wgrad.tokens >= T
                    assert (wgrad.splits - 1) * wgrad.tokens < max(T, 1), "a part without tokens"
                    assert dtype != torch.float32 or wgrad.tokens <= 2048, "a long sum in fp32"
                    for splits, features in ((forward.splits, 4096), (backward.splits, 1000)):
                        assert 1 <= splits <= configs.ceil_div(features, forward.shrink.F)
                        assert dtype != torch.float32 or features <= 1024 * splits, "a long sum in fp32"
                    for tile in (forward.shrink, forward.expand, backward.shrink, backward.expand, wgrad.tile):
                        assert tile.stages >= 2
                        assert min(tile.T, tile.F, tile.ER, tile.E) >= 16, "less than a dot takes"


@pytest.mark.parametrize("features", [2048, 4096, 14336])
def test_lengths_that_vary_meet_few_kernels(features: int) -> None:
    """What a plan fixes of the kernels' constants; each kind is compiled on its first call."""
    kinds = set()
    for T in range(1, 16385, 64):
        sizes = Sizes(T, features, features, 8, 16, 8)
        forward, backward = (
            plan(sizes, torch.bfloat16, H200)
            for plan in (configs.forward_plan.__wrapped__, configs.backward_plan.__wrapped__)
        )
        # the chunk of expand is no constant of its kernel
        kinds.add(tuple(replace(plan, expand=replace(plan.expand, chunk=0)) for plan in (forward, backward)))
    assert len(kinds) <= 14


def test_one_pass_where_tokens_fill_the_chip_and_experts_fit() -> None:
    a100 = next(chip for chip in CHIPS if chip.arch == "sm_80")

    def one_pass(T: int, E: int, R: int, chip: Chip = a100) -> bool:
        return configs.forward_plan(Sizes(T, 4096, 4096, E, R, E), torch.bfloat16, chip).one_pass is not None

    assert one_pass(12_000, 8, 16)
    assert one_pass(65536, 8, 16)
    assert not one_pass(8192, 8, 4, H200), "slower than the stages when it was timed"
    assert not one_pass(1024, 8, 16), "most of the processors would be idle"
    assert not one_pass(65536, 64, 16), "E R = 1024 fits no tile"


def test_the_interpreter_is_taken_only_where_it_is_asked_for() -> None:
    t = make_problem(Case(), torch.float32).tensors
    automatic = explain(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])
    assert "triton     not taken: on a CPU only if selected by name" in automatic
    assert "torch      taken" in automatic
    named = explain(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], backend="triton")
    assert "triton     taken: selected by name" in named


@pytest.mark.parametrize("compiler, include, reason", [(None, None, "C compiler"), ("/bin/gcc", "nowhere", "Python.h")])
def test_where_triton_cannot_build_a_launcher_it_is_not_taken_by_default(
    compiler: str | None, include: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu = Problem(Sizes(512, 64, 64, 8, 16, 8), torch.bfloat16, torch.device("cuda", 0))
    why_not_by_default = dispatch.BACKENDS["triton"].why_not_by_default
    monkeypatch.setattr(availability.shutil, "which", lambda name: compiler)
    monkeypatch.delenv("CC", raising=False)
    if include is not None:
        monkeypatch.setattr(availability.sysconfig, "get_paths", lambda scheme: {"include": include})
    availability._why_no_launchers.cache_clear()
    try:
        assert reason in (why_not_by_default(on_a_gpu) or "")
    finally:
        availability._why_no_launchers.cache_clear()


def test_a_call_that_no_kernel_takes_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'triton': its kernels take at most 256 experts, not 257"):
        make_problem(Case(E=257), torch.float32).call("triton")
    t = make_problem(Case(), torch.float32).tensors
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="'triton': its kernels run on GPUs, not on cpu"):
        lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], backend="triton")
