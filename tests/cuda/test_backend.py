"""What only the cuda backend has: its plans, its paths, its refusals. The kernels run on the emulator."""

import json
import sys

import pytest
import torch

from lmoe_kernels import dispatch, info, lmoe
from lmoe_kernels.backends.cuda import availability, backward, configs, extension, forward
from lmoe_kernels.options import Problem, Sizes
from tests.problems import CASES, Case, assert_all_no_worse, gradients, leaves_of, make_problem, outcome
from tests.problems import Problem as RandomProblem
from tools import calls
from tools.error_rule import assert_no_worse

HALVES = [torch.bfloat16, torch.float16]
PROCESSORS = 3  # of the emulated device: tools/emulator/machine.h


# Few tokens, odd sizes and options of every kind, more columns than a product's tile, more experts than a warp has lanes.
PATH_CASES = [*CASES[:3], *CASES[5:9], CASES[9], CASES[11], Case(T=65, I=24, O=136, E=9, R=16), Case(T=70, I=72, O=264, R=8)]
PATH_CASES += [
    Case(T=5, I=24, O=40, E=40, R=2, top_k=3),
    *(case for case in CASES if not case.renormalize or case.gate_bias),
]


@pytest.fixture(params=["one pass", "stages", "shrink in parts"])
def path(request: pytest.FixtureRequest, emulated_cuda, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path of the forward for any number of tokens, whatever path the shape would take."""
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: None)
    processors = 1 if request.param == "one pass" else 1 << 20  # any tile fills one, none fills a million
    plan = configs.one_pass_smem
    monkeypatch.setattr(forward, "one_pass_smem", lambda *sizes: plan(*sizes[:-1], processors))
    parts = 3 if request.param == "shrink in parts" else 1
    for module in (forward, backward):
        monkeypatch.setattr(module, "shrink_parts", lambda *sizes: parts)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", PATH_CASES, ids=str)
def test_every_path_is_no_worse_than_plain_pytorch(case: Case, dtype: torch.dtype, path: str, watch) -> None:
    _compare_all(make_problem(case, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [CASES[6], CASES[8], Case(T=66, I=40, O=56, E=9, R=16)], ids=str)
def test_fp32_parameters_on_every_path(case: Case, dtype: torch.dtype, path: str, watch) -> None:
    _compare_all(make_problem(case, dtype, param_dtype=torch.float32))


@pytest.mark.parametrize("case", [Case(T=40, I=4096, O=40, E=2, R=4), Case(T=40, I=40, O=4096, E=2, R=4)], ids=str)
def test_long_sums_in_fp32(case: Case, path: str, watch) -> None:
    _compare_all(make_problem(case, torch.float32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [Case(T=66, I=1032, O=1040, E=3, R=5, top_k=2), Case(T=129, I=40, O=1536)], ids=str)
def test_shapes_that_are_split_by_default(case: Case, dtype: torch.dtype, emulated_cuda, watch) -> None:
    T, I, O, E, R = case.T, case.I, case.O, case.E, case.R  # noqa: E741
    parts = [configs.shrink_parts(T, columns, features, 2, PROCESSORS) for columns, features in ((E * R + E, I), (E * R, O))]
    splits = configs.wgrad_splits(T, E * R, min(I, O), 2, PROCESSORS)
    one_pass = configs.one_pass_smem(T, E, R, E * R + E, 2, PROCESSORS) > 0
    assert (parts, splits, one_pass) == (([3, 3], 1, False) if T == 66 else ([1, 3], 3, False) if T == 129 else None)
    _compare_all(make_problem(case, dtype))


def _compare_all(problem: RandomProblem) -> None:
    """Results when nothing is saved and when a backward follows, then every gradient."""
    leaves = leaves_of(problem.tensors)
    y, logits = problem.call("cuda")
    saved = outcome(problem, problem.call("cuda", **leaves), leaves)
    assert torch.equal(y, saved["y"])
    assert torch.equal(logits, saved["router_logits"])
    assert_all_no_worse(problem, saved)


@pytest.mark.parametrize("base_shape", [None, (136,), (70, 136), (70, 139)], ids=str)
@pytest.mark.parametrize("save", [True, False], ids=["save", "no save"])
def test_base_and_what_is_allocated(save: bool, base_shape: tuple[int, ...] | None, path: str, watch) -> None:
    problem = make_problem(Case(T=70, I=40, O=136, E=4, R=8), torch.float32)
    base = None if base_shape is None else torch.randn(base_shape)[..., :136]
    _compare_with_reference(problem, base=base, save=save)
    # y; u and logits if they are saved, in stages always; in stages also v and the partial sums
    made = [count for _, count in watch.buffers]
    if path == "one pass":
        assert made == [70 * 136, *([70 * 4 * 8, 70 * 4] if save else [])]
    else:
        parts = 3 if path == "shrink in parts" else 1
        assert made == [70 * 136, 70 * 4 * 8, 70 * 4, 70 * 32, parts * 70 * 36]


def test_split_sums_repeat_the_same_bits(emulated_cuda, monkeypatch, watch) -> None:
    problem = make_problem(Case(T=70, I=1600, O=1100, E=3, R=8), torch.bfloat16)
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
def test_split_weight_gradients(splits: int, dtype: torch.dtype, emulated_cuda, monkeypatch, watch) -> None:
    monkeypatch.setattr(backward, "wgrad_splits", lambda *sizes: splits)
    problem = make_problem(Case(T=100, I=24, O=40, E=3, R=8), dtype)
    leaves = leaves_of(problem.tensors)
    assert_all_no_worse(problem, gradients(problem, problem.call("cuda", **leaves), leaves))


def test_rows_of_any_alignment(emulated_cuda, watch) -> None:
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
@pytest.mark.parametrize("tokens", [1, 3, 9, 16])
def test_decode_of_long_rows(tokens: int, dtype: torch.dtype, param_dtype: torch.dtype | None, emulated_cuda, watch) -> None:
    """Chunks of several steps, the last one incomplete; the same bits with unaligned rows, and when u is saved."""
    case = Case(T=tokens, I=2056, O=24, E=2, R=3)
    plan = configs.decode_plan(tokens, case.I, case.O, 2, 2, 3, True, dtype.itemsize, extension.device_of(0))
    assert plan is not None
    assert (plan.chunk, plan.chunks) == (1280, 2)
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
        plan = configs.decode_plan(5, 520, 70, 4, 4, 8, True, 2, _device(processors))
        assert plan is not None
        assert plan.blocks <= processors
        same_sums = configs.DecodePlan(plan.blocks, 256, 4, plan.column_tile, plan.smem)
        monkeypatch.setattr(forward, "decode_plan", lambda *sizes, p=same_sums: p)
        results.append(problem.call("cuda")[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("processors", [1, 3, 108, 132, 170])
def test_the_path_of_a_forward(processors: int) -> None:
    """One pass where few processors have no block in the last wave, and where its columns and shared memory fit a block."""
    for tokens in (0, 1, 128, 129, 512, 1000, 8192, 13_824, 16_384, 100_000):
        tiles = len(range(0, tokens, 128))
        waves = len(range(0, tiles, processors))
        fills = tiles > 0 and (waves * processors - tiles) / (waves * processors) <= 1 / 6
        assert (configs.one_pass_smem(tokens, 8, 16, 136, 2, processors) > 0) == fills
    for experts, rank, columns, size, fits in (
        (8, 16, 144, 2, True), (8, 16, 145, 2, False), (8, 16, 128, 4, False), (4, 16, 68, 4, True),
        (12, 16, 28, 2, False), (11, 16, 27, 2, True), (40, 2, 120, 2, False),
    ):  # fmt: skip
        smem = configs.one_pass_smem(1 << 20, experts, rank, columns, size, processors)
        assert (smem > 0) == fits, (experts, rank, columns, size, smem)
        assert smem <= 99 << 10


@pytest.mark.parametrize(
    "tokens, processors, one_pass",
    [(8192, 132, False), (13_824, 132, False), (16_384, 132, True), (16_897, 132, False), (32_768, 132, True),
     (8192, 108, False), (13_824, 108, True), (16_384, 108, False), (32_768, 108, False), (49_152, 108, True)],
)  # fmt: skip
def test_one_pass_counts_waves(tokens: int, processors: int, one_pass: bool) -> None:
    """128 tiles are one wave on an H100; on an A100 they are two, and the second one has 20 blocks for 108 processors."""
    assert (configs.one_pass_smem(tokens, 8, 16, 136, 2, processors) > 0) == one_pass


@pytest.mark.parametrize("processors", [1, 3, 108, 132, 170])
def test_sums_are_split_where_tiles_leave_processors_idle(processors: int) -> None:
    """A split leaves every processor fewer steps, and is made at least where half of the processors have no tile."""
    for tokens in (1, 129, 1000, 8192, 100_000):
        for columns, features in ((64, 64), (65, 4096), (136, 4096), (272, 11_008), (300, 1000)):
            of_columns = configs.ceil_div(columns, configs.product_columns(columns))
            of_tokens, of_features = configs.ceil_div(tokens, 128), configs.ceil_div(features, 128)
            for tiles, length, plan in (
                (of_tokens * of_columns, features, configs.shrink_parts(tokens, columns, features, 2, processors)),
                (of_features * of_columns, tokens, configs.wgrad_splits(tokens, columns, features, 2, processors)),
            ):
                steps = configs.ceil_div(length, 64)

                def most(parts: int, tiles: int = tiles, steps: int = steps) -> int:
                    """Steps of the processor that has the most."""
                    return configs.ceil_div(tiles * parts, processors) * configs.ceil_div(steps, parts)

                assert 1 <= plan <= steps
                assert plan == 1 or most(plan) < most(1)
                assert plan > 1 or 2 * tiles > processors or steps < 4


@pytest.mark.parametrize(
    "tokens, features, processors, groups",
    [(64, 4096, 132, 32), (4096, 4096, 132, 8), (8192, 4096, 132, 4), (2048, 2048, 108, 6), (1024, 4096, 108, 11),
     (0, 0, 132, 1), (1 << 20, 64, 1, 1)],
)  # fmt: skip
def test_the_groups_of_expand(tokens: int, features: int, processors: int, groups: int) -> None:
    """Two blocks for nearly every processor, or one where a few processors would have two: 96 blocks on an A100."""
    assert configs.expand_groups(tokens, features, processors) == groups


@pytest.mark.parametrize(
    ("columns", "width"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 144), (144, 144), (145, 128), (256, 128),
                           (257, 144), (272, 144), (288, 144), (289, 128), (300, 128), (432, 144)]
)  # fmt: skip
def test_the_columns_of_a_product(columns: int, width: int) -> None:
    """Few tiles, then little waste."""
    assert configs.product_columns(columns) == width


def test_two_blocks_of_the_one_pass_fit_a_processor() -> None:
    a_block = configs.one_pass_smem(1 << 20, 8, 16, 136, 2, 132) + 1024  # the system keeps 1 KB
    assert 2 * a_block <= 228 << 10  # sm_90


@pytest.mark.parametrize("processors", [1, 108, 132])
def test_decode_plans_cover_the_problem_and_fit(processors: int) -> None:
    taken = 0
    for tokens in (1, 4, 16):
        for sizes in ((4096, 4096), (11008, 4096), (4096, 14336), (1, 1), (0, 8)):
            for experts, rank in ((8, 16), (1, 1), (64, 16), (8, 256)):
                plan = configs.decode_plan(tokens, *sizes, experts, experts, rank, True, 2, _device(processors))
                if plan is None:
                    continue
                taken += 1
                assert plan.smem <= configs.DECODE_SMEM
                assert 1 <= plan.blocks <= processors
                assert plan.chunk % configs.WARP_FEATURES == 0
                assert plan.column_tile % 8 == 0
                assert plan.chunk * plan.chunks >= sizes[0]
                assert plan.chunks == 1 or sizes[0] >= 1024 * plan.chunks, "a warp has less than a batch of loads"
                assert plan.chunks == 1 or plan.chunks * experts * (rank + 1) <= 8 * processors, "rows wait for others"
    assert taken > 30
    assert configs.decode_plan(17, 64, 64, 1, 1, 1, True, 2, _device(processors)) is None


def _device(processors: int) -> extension.Device:
    """An H100 of so many processors."""
    return extension.Device(processors, 227 << 10, cooperative=True)


def test_plans_that_disagree_with_the_kernel_are_refused(emulated_cuda, monkeypatch) -> None:
    plan = configs.DecodePlan(1, 256, 1, 48, 4096)
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: plan)
    with pytest.raises(RuntimeError, match=r"decode_fwd_kernel: .* count shared memory differently"):
        make_problem(Case(), torch.bfloat16).call("cuda")
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: None)
    monkeypatch.setattr(forward, "one_pass_smem", lambda *sizes: 59392)
    with pytest.raises(RuntimeError, match=r"forward_kernel: .* count columns or shared memory differently"):
        make_problem(Case(), torch.bfloat16).call("cuda")


def test_a_refused_launch_is_reported_once(emulated_cuda, monkeypatch) -> None:
    problem = make_problem(Case(T=2), torch.bfloat16)
    plan = configs.decode_plan
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: plan(*sizes)._replace(blocks=4))  # of 3 processors
    with pytest.raises(RuntimeError, match="decode_fwd_kernel: too many blocks in cooperative launch"):
        problem.call("cuda")
    monkeypatch.setattr(forward, "decode_plan", lambda *sizes: None)
    problem.call("cuda")


def test_the_reason_of_a_missing_extension_is_shown(monkeypatch, tmp_path) -> None:
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


def test_info_shows_how_the_extension_was_built(emulated_cuda, monkeypatch, tmp_path) -> None:
    for record, line in (
        ({"cuda": "built", "nvcc": "13.0", "archs": "80 90+PTX"}, "CUDA extension: nvcc 13.0 for 80 90+PTX"),
        ({"cuda": "setup.py has not run here"}, "CUDA extension: loaded; setup.py left no record of the build"),
    ):
        path = tmp_path / "_build_info.json"
        path.write_text(json.dumps(record))
        monkeypatch.setattr(extension, "BUILD_INFO", path)
        assert line in info.report().splitlines()

    def missing() -> None:
        raise ImportError("lmoe: the extension was not built: no nvcc in PATH or CUDA_HOME")

    monkeypatch.setattr(extension, "library", missing)
    assert "CUDA extension: the extension was not built: no nvcc in PATH or CUDA_HOME" in info.report().splitlines()


def test_a_gpu_that_cannot_run_the_kernels_is_named(monkeypatch) -> None:
    """A driver too old, an architecture left out of the build, a GPU before Ampere, each as torch would report it."""

    def too_old(index: int) -> int:
        raise RuntimeError("lmoe: CUDA kernels: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(extension, "_load", lambda: (sys, None))
    monkeypatch.setattr(extension, "device_of", too_old)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    for capability, reason in (((9, 0), "driver version is insufficient"), ((7, 5), "needs compute capability 8.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        availability._why_not_on.cache_clear()
        problem = _problem(1, "cuda:7")
        assert reason in (dispatch.BACKENDS["cuda"].why_not(problem) or "")
        assert dispatch.choose("lmoe", problem, dispatch.AUTO) != "cuda"
    availability._why_not_on.cache_clear()


def test_cpu_and_fp64_are_refused_and_not_chosen() -> None:
    assert dispatch.choose("lmoe", _problem(1), dispatch.AUTO) == "torch"
    x, factor = torch.zeros(1, 4).double(), torch.zeros(1, 1, 4).double()
    with pytest.raises(ValueError, match=r"got 'cuda': it computes in fp32, bf16 and fp16, not in torch\.float64"):
        lmoe(x, factor, factor, gate_weight=x, backend="cuda")


def test_the_automatic_choice_takes_it_for_few_tokens(emulated_cuda, monkeypatch) -> None:
    monkeypatch.setitem(dispatch.BACKENDS, "triton", dispatch.BACKENDS["reference"])
    few, many = _problem(16, "cuda:0"), _problem(17, "cuda:0")
    assert dispatch.choose("lmoe", few, dispatch.AUTO) == "cuda"
    assert dispatch.choose("lmoe", many, dispatch.AUTO) == "torch"
    assert "its forward is one launch at T <= 16 alone" in dispatch.explain_choice("lmoe", many, dispatch.AUTO)


def test_on_a_cpu_it_is_taken_only_by_name(emulated_cuda) -> None:
    few = _problem(64)
    assert dispatch.choose("lmoe", few, "cuda") == "cuda"
    assert dispatch.choose("lmoe", few, dispatch.AUTO) == "torch"
    assert "cuda       not taken: on a CPU only if selected by name" in dispatch.explain_choice("lmoe", few, dispatch.AUTO)


def test_on_a_cpu_the_choice_does_not_look_for_the_extension(monkeypatch) -> None:
    def look() -> None:
        raise AssertionError("the extension was looked for")

    monkeypatch.setattr(extension, "why_not_loaded", look)
    assert dispatch.choose("lmoe", _problem(1), dispatch.AUTO) == "torch"


def _problem(tokens: int, device: str = "cpu") -> Problem:
    return Problem(Sizes(tokens, 64, 64, 2, 4, 2), torch.bfloat16, torch.device(device))


def test_saved_u_is_the_reference_s(emulated_cuda, watch) -> None:
    _compare_with_reference(make_problem(Case(T=3), torch.float32))


def _compare_with_reference(problem: RandomProblem, base: torch.Tensor | None = None, save: bool = True) -> None:
    """y, logits and u of the kernels: given where the reference gives them, and no worse than the reference in fp32."""

    def results(backend: str, to: torch.dtype) -> list[torch.Tensor]:
        tensors = {name: t.to(to) for name, t in problem.tensors.items()}
        y, saved = calls.forward(
            backend, tensors["x"], calls.factors_of(tensors), problem.case.options,
            base=None if base is None else base.to(to), save=save,
        )  # fmt: skip
        assert (saved is not None) == save
        return [y, *(() if saved is None else saved)]

    plain, exact = results("reference", torch.float32), results("reference", torch.float64)
    ours = results("cuda", torch.float32)
    for name, result, other, true in zip(("y", "logits", "u"), ours, plain, exact, strict=False):
        assert_no_worse(name, result, [other], true)
