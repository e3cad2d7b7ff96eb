"""What is the cuda backend's own: its plans, its ways forward and back, refusals; its kernels run on the emulator."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from lmoe_kernels import dispatch, info, lmoe, reference
from lmoe_kernels.backends.cuda import backward as backward_module
from lmoe_kernels.backends.cuda import configs, extension
from lmoe_kernels.backends.cuda import forward as forward_module
from tests.problems import CASES, Case, Problem, assert_all_no_worse, gradients, leaves_of, make_problem, outcome
from tools.error_rule import assert_no_worse

HALVES = [torch.bfloat16, torch.float16]


# Few tokens, odd sizes and options of every kind, more columns than shrink takes at a time, more tokens than a tile, more
# experts than a warp has lanes.
WAYS_CASES = [*CASES[:3], *CASES[5:9], CASES[9], CASES[11], Case(T=65, I=24, O=136, E=9, R=16), Case(T=70, I=72, O=264, R=8)]
WAYS_CASES += [Case(T=5, I=24, O=40, E=40, R=2, top_k=3), *(case for case in CASES if not case.renormalize)]


@pytest.fixture(params=["one pass", "stages", "shrink in parts"])
def way(request: pytest.FixtureRequest, emulated_cuda, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way through the kernels for any number of tokens, whatever way the shape would take."""
    forward, backward = _module(forward_module), _module(backward_module)
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: None)
    processors = 1 if request.param == "one pass" else 1 << 20  # one that tiles fill, or far more than tiles
    plan = configs.one_pass_smem
    monkeypatch.setattr(forward, "one_pass_smem", lambda *sizes: plan(*sizes[:-1], processors))
    parts = 3 if request.param == "shrink in parts" else 1
    for module in (forward, backward):
        monkeypatch.setattr(module, "shrink_parts", lambda *sizes: parts)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", WAYS_CASES, ids=str)
def test_every_way_is_no_worse_than_plain_pytorch(case: Case, dtype: torch.dtype, way: str, watch) -> None:
    _compare_all(make_problem(case, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [CASES[6], CASES[8], Case(T=66, I=40, O=56, E=9, R=16)], ids=str)
def test_fp32_parameters_on_every_way(case: Case, dtype: torch.dtype, way: str, watch) -> None:
    _compare_all(make_problem(case, dtype, param_dtype=torch.float32))


@pytest.mark.parametrize("case", [Case(T=40, I=4096, O=40, E=2, R=4), Case(T=40, I=40, O=4096, E=2, R=4)], ids=str)
def test_long_sums_in_fp32(case: Case, way: str, watch) -> None:
    _compare_all(make_problem(case, torch.float32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [Case(T=66, I=1032, O=1040, E=3, R=5, top_k=2), Case(T=129, I=40, O=1536)], ids=str)
def test_shapes_that_take_parts_by_themselves(case: Case, dtype: torch.dtype, emulated_cuda, watch) -> None:
    processors = emulated_cuda.processors(0)
    in_parts = [configs.shrink_parts(case.T, features, processors) > 1 for features in (case.I, case.O)]
    assert in_parts == ([True, True] if case.T == 66 else [False, False])
    assert (configs.one_pass_smem(case.T, case.E, case.R, 2, processors) > 0) == (case.T == 129)
    _compare_all(make_problem(case, dtype))


def _compare_all(problem: Problem) -> None:
    """Results without anything saved, and with it; then every gradient."""
    leaves = leaves_of(problem.tensors)
    y, logits = problem.call("cuda")
    saved = outcome(problem, problem.call("cuda", **leaves), leaves)
    assert torch.equal(y, saved["y"])
    assert torch.equal(logits, saved["router_logits"])
    assert_all_no_worse(problem, saved)


@pytest.mark.parametrize("base_shape", [None, (136,), (70, 136), (70, 139)], ids=str)
@pytest.mark.parametrize("save", [True, False], ids=["save", "no save"])
def test_base_and_what_is_allocated(save: bool, base_shape: tuple[int, ...] | None, way: str, watch) -> None:
    case = Case(T=70, I=40, O=136, E=4, R=8)
    t = make_problem(case, torch.float32).tensors
    base = None if base_shape is None else torch.randn(base_shape)[..., :136]
    args = (t["x"], t["lora_a"], t["lora_b"], t["gate_weight"], None, base, 0.5, "factors", None, True, save)
    _compare_with_reference(args)
    # y, u and logits where they are saved; stage by stage these two always, v, gates, and the parts' sums
    made = [count for _, count in watch.buffers]
    if way == "one pass":
        assert made == [70 * 136, *([70 * 4 * 8, 70 * 4] if save else [])]
    else:
        parts = 3 * 70 * 36 if way == "shrink in parts" else 0
        assert made == [70 * 136, 70 * 4 * 8, 70 * 4, 70 * 32, 70 * 4, parts]


def test_sums_in_parts_repeat_the_same_bits(emulated_cuda, monkeypatch, watch) -> None:
    problem = make_problem(Case(T=70, I=1600, O=1100, E=3, R=8), torch.bfloat16)
    forward, backward = _module(forward_module), _module(backward_module)
    monkeypatch.setattr(forward, "one_pass_smem", lambda *sizes: 0)
    for parts in (2, 3):
        for module in (forward, backward):
            monkeypatch.setattr(module, "shrink_parts", lambda *sizes, n=parts: n)
        runs = []
        for _ in range(2):
            leaves = leaves_of(problem.tensors)
            results = problem.call("cuda", **leaves)
            runs.append([*results, *gradients(problem, results, leaves).values()])
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("splits", [2, 7])
def test_weight_gradients_summed_in_parts(splits: int, dtype: torch.dtype, emulated_cuda, monkeypatch, watch) -> None:
    monkeypatch.setattr(_module(backward_module), "wgrad_splits", lambda *sizes: splits)
    problem = make_problem(Case(T=100, I=24, O=40, E=3, R=8), dtype)
    leaves = leaves_of(problem.tensors)
    assert_all_no_worse(problem, gradients(problem, problem.call("cuda", **leaves), leaves))


def test_rows_that_start_anywhere(emulated_cuda, watch) -> None:
    case = Case(T=9, I=40, O=48, E=4, R=8)
    t = make_problem(case, torch.bfloat16).tensors
    wide = torch.randn(9, 61).bfloat16()
    for start in (0, 1, 3, 8):
        x = wide[:, start : start + 40]
        y = lmoe(x, t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], backend="cuda")
        dense = lmoe(x.clone(), t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], backend="cuda")
        assert torch.equal(y, dense)


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [(torch.float32, None), *((half, p) for half in HALVES for p in (None, torch.float32))]
)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_decode_of_long_rows(tokens: int, dtype: torch.dtype, param_dtype: torch.dtype | None, emulated_cuda, watch) -> None:
    """Chunks of several steps, the last cut short; the same bits where rows do not start on 16 bytes, or u is saved."""
    case = Case(T=tokens, I=2056, O=24, E=2, R=3)
    plan = configs.decode_plan(tokens, case.I, case.O, 2, 2, 3, True, dtype.itemsize, emulated_cuda.processors(0))
    assert plan is not None
    assert (plan.chunk, plan.chunks) == (768, 3)
    problem = make_problem(case, dtype, param_dtype=param_dtype)
    y, logits = problem.call("cuda")
    assert_all_no_worse(problem, {"y": y, "router_logits": logits})
    anywhere = torch.nn.functional.pad(problem.tensors["x"], (1, 0))[:, 1:]
    for again in (problem.call("cuda", x=anywhere), problem.call("cuda", **leaves_of(problem.tensors))):
        assert torch.equal(again[0], y)
        assert torch.equal(again[1], logits)


def test_decode_gives_the_same_bits_on_any_number_of_processors(emulated_cuda, monkeypatch, watch) -> None:
    problem = make_problem(Case(T=5, I=520, O=70, E=4, R=8), torch.bfloat16)
    results = []
    for processors in (1, 2, 3):
        plan = configs.decode_plan(5, 520, 70, 4, 4, 8, True, 2, processors)
        assert plan is not None
        assert plan.blocks <= processors
        same_sums = configs.DecodePlan(plan.blocks, 256, 3, plan.column_tile, plan.smem)
        monkeypatch.setattr(_module(forward_module), "decode_plan", lambda *sizes, p=same_sums: p)
        results.append(problem.call("cuda")[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("processors", [1, 3, 108, 132, 170])
def test_the_way_of_a_forward(processors: int) -> None:
    """One pass where tiles of tokens fill two thirds of the chip and fit, else as many parts as fill it."""
    for tokens in (1, 64, 65, 512, 1000, 4096, 8192, 100_000):
        tiles = -(-tokens // 64)
        fills = 3 * tiles > 2 * processors
        smem = configs.one_pass_smem(tokens, 8, 16, 2, processors)
        parts = configs.shrink_parts(tokens, 4096, processors)
        assert (smem > 0) == fills
        assert (parts == 1) == fills
        assert 1 <= parts <= 8
        assert parts == 8 or abs(parts * tiles - processors) <= tiles / 2 or parts == 1
        assert configs.shrink_parts(tokens, 1023, processors) == 1
    for experts, rank, size, fits in (
        (8, 16, 4, True), (16, 16, 2, True), (16, 16, 4, False), (8, 64, 2, False), (64, 16, 2, False)
    ):  # fmt: skip
        smem = configs.one_pass_smem(1 << 20, experts, rank, size, processors)
        assert (smem > 0) == fits
        assert smem <= 99 << 10


def test_two_blocks_of_the_one_pass_fit_a_processor() -> None:
    a_block = configs.one_pass_smem(8192, 8, 16, 2, 108) + 1024  # that the system keeps
    assert 2 * a_block <= 164 << 10  # sm_80


@pytest.mark.parametrize("processors", [1, 108, 132])
def test_decode_plans_cover_the_problem_and_fit(processors: int) -> None:
    taken = 0
    for tokens in (1, 16, 64):
        for sizes in ((4096, 4096), (11008, 4096), (4096, 14336), (1, 1), (0, 8)):
            for experts, rank in ((8, 16), (1, 1), (64, 16), (8, 256)):
                plan = configs.decode_plan(tokens, *sizes, experts, experts, rank, True, 2, processors)
                if plan is None:
                    continue
                taken += 1
                assert plan.smem <= configs.DECODE_SMEM
                assert 1 <= plan.blocks <= processors
                assert plan.chunk % configs.WARP_FEATURES == 0
                assert plan.column_tile % 8 == 0
                assert plan.chunk * plan.chunks >= sizes[0] > plan.chunk * (plan.chunks - 1) - 1
    assert taken > 30
    assert configs.decode_plan(65, 64, 64, 1, 1, 1, True, 2, processors) is None


def test_an_address_off_by_a_byte_is_refused(emulated_cuda: ModuleType) -> None:
    params, bf16 = emulated_cuda.ForwardParams(), extension.DTYPES[torch.bfloat16]
    x = 4097
    params.set_problem(bf16, *[1] * 7, True, 1.0, True, x, 1, 0, False, 0, False, 0, False, 0, True, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="x must lie on a multiple of its element's size, got address 4097"):
        emulated_cuda.forward(params, 0, 0)


def test_plans_that_disagree_with_the_kernel_are_refused(emulated_cuda, monkeypatch) -> None:
    plan = configs.DecodePlan(1, 256, 1, 48, 4096)
    monkeypatch.setattr(_module(forward_module), "decode_plan", lambda *sizes: plan)
    with pytest.raises(RuntimeError, match=r"decode_fwd_kernel: .* count shared memory differently"):
        make_problem(Case(), torch.bfloat16).call("cuda")
    monkeypatch.setattr(_module(forward_module), "decode_plan", lambda *sizes: None)
    monkeypatch.setattr(_module(forward_module), "one_pass_smem", lambda *sizes: 59392)
    with pytest.raises(RuntimeError, match=r"forward_kernel: .* count shared memory differently"):
        make_problem(Case(), torch.bfloat16).call("cuda")


def test_a_refused_launch_is_told_once(emulated_cuda, monkeypatch) -> None:
    problem = make_problem(Case(T=2), torch.bfloat16)
    forward, plan = _module(forward_module), configs.decode_plan
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: replace(plan(*sizes), blocks=emulated_cuda.processors(0) + 1))
    with pytest.raises(RuntimeError, match="decode_fwd_kernel: too many blocks in cooperative launch"):
        problem.call("cuda")
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: None)
    problem.call("cuda")


def test_the_reason_of_a_missing_extension_is_told(monkeypatch, tmp_path) -> None:
    path = tmp_path / "_build_info.json"
    path.write_text(json.dumps({"cuda": "no nvcc in PATH or CUDA_HOME"}))
    monkeypatch.setattr(extension, "BUILD_INFO", path)

    def no_module(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(extension, "import_module", no_module)
    extension._load.cache_clear()
    try:
        x, factor = torch.randn(2, 4), torch.randn(1, 1, 4)
        with pytest.raises(ValueError, match="got 'cuda': the extension was not built: no nvcc in PATH or CUDA_HOME"):
            lmoe(x, factor, factor, gate_weight=torch.randn(1, 4), backend="cuda")
        with pytest.raises(ImportError, match="lmoe: the extension was not built: no nvcc"):
            extension.library()
    finally:
        extension._load.cache_clear()


def test_info_tells_what_became_of_the_extension(emulated_cuda, monkeypatch, tmp_path) -> None:
    for record, told in (
        ({"cuda": "built", "nvcc": "13.0", "archs": "80 90+PTX"}, "CUDA extension: nvcc 13.0 for 80 90+PTX"),
        ({"cuda": "setup.py has not run here"}, "CUDA extension: loads; setup.py left no record of its build"),
    ):
        path = tmp_path / "_build_info.json"
        path.write_text(json.dumps(record))
        monkeypatch.setattr(extension, "BUILD_INFO", path)
        assert told in info.report().splitlines()

    def missing() -> None:
        raise ImportError("lmoe: the extension was not built: no nvcc in PATH or CUDA_HOME")

    monkeypatch.setattr(extension, "library", missing)
    assert "CUDA extension: the extension was not built: no nvcc in PATH or CUDA_HOME" in info.report().splitlines()


def test_a_gpu_that_cannot_run_the_kernels_is_told(monkeypatch) -> None:
    """A driver too old, an architecture left out of the build, a GPU before Ampere: the answers of torch are made up."""
    gpu = torch.device("cuda", 7)

    def too_old(index: int) -> int:
        raise RuntimeError("lmoe: CUDA kernels: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(extension, "_load", lambda: (sys, None))
    monkeypatch.setattr(extension, "processors", too_old)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    for capability, reason in (((9, 0), "driver version is insufficient"), ((7, 5), "needs compute capability 8.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        extension._why_not_device.cache_clear()
        problem = dispatch.Problem(gpu, torch.bfloat16, 1, 64, 64, 2, 4)
        assert reason in (dispatch.BACKENDS["cuda"].why_not(problem) or "")
        assert dispatch.choose("lmoe", problem, None) != "cuda"
    extension._why_not_device.cache_clear()


def test_cpu_and_fp64_are_refused_and_not_chosen() -> None:
    cpu = dispatch.Problem(torch.device("cpu"), torch.bfloat16, 1, 64, 64, 2, 4)
    assert dispatch.choose("lmoe", cpu, None) == "torch"
    x, factor = torch.zeros(1, 4).double(), torch.zeros(1, 1, 4).double()
    with pytest.raises(ValueError, match=r"got 'cuda': it computes in fp32, bf16 and fp16, not in torch\.float64"):
        lmoe(x, factor, factor, gate_weight=x, backend="cuda")


def test_the_automatic_choice_takes_it_for_few_tokens(emulated_cuda) -> None:
    few, many = (dispatch.Problem(torch.device("cpu"), torch.bfloat16, tokens, 64, 64, 2, 4) for tokens in (64, 65))
    assert dispatch.choose("lmoe", few, None) == "cuda"
    assert dispatch.choose("lmoe", many, None) == "torch"
    assert "expected to win at T <= 64" in dispatch.explain_choice("lmoe", many, None)


def test_saved_u_is_the_reference_s(emulated_cuda, watch) -> None:
    t = make_problem(Case(T=3), torch.float32).tensors
    args = (t["x"], t["lora_a"], t["lora_b"], t["gate_weight"], None, None, 0.5, "factors", None, True, True)
    _compare_with_reference(args)


def _compare_with_reference(args: tuple) -> None:
    """y, logits and u of the kernels, each there where the reference has it, and no worse than the reference in fp32."""
    exact = reference.forward(*(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args))
    results = zip(("y", "logits", "u"), dispatch.load("cuda").forward(*args), reference.forward(*args), exact, strict=True)
    for name, ours, plain, true in results:
        assert (ours is None) == (plain is None)
        if ours is not None:
            assert_no_worse(name, ours, [plain], true)


def _module(function) -> ModuleType:
    """The module a backend's function is defined in: the package's name for it is the function's."""
    return sys.modules[function.__module__]
