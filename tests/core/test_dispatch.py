"""Which backend a call takes: the automatic choice on a simulated GPU; `use_backend` with errors, overlaps and threads."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from lmoe_kernels import dispatch, lmoe, use_backend
from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.triton import availability
from lmoe_kernels.dispatch import AUTO, BACKENDS, Backend
from lmoe_kernels.options import Problem, Sizes
from tests.problems import Case, make_problem

GPU = Problem(Sizes(T=513, I=64, O=64, E=8, R=16, experts_of_a=8), torch.bfloat16, torch.device("cuda"))
HERE = GPU._replace(device=torch.device("cpu"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Simulates a GPU of compute capability 8.0, with a tested Triton, a C compiler and the CUDA extension."""
    availability._why_not_chip.cache_clear()
    availability._why_untested.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(availability, "_installed", lambda package: True)
    monkeypatch.setattr(availability, "_why_no_launchers", lambda: None)
    monkeypatch.setattr(availability, "_version_of_triton", lambda: "3.6.0")
    monkeypatch.setitem(BACKENDS, "cuda", BACKENDS["cuda"]._replace(why_not=lambda problem: None))
    a100 = extension.Device(108, 163 << 10, cooperative=True)
    monkeypatch.setattr(extension, "device_of", lambda index: a100)
    yield monkeypatch
    availability._why_not_chip.cache_clear()
    availability._why_untested.cache_clear()


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> str:
    """A further backend, which a call takes only by name."""
    row = Backend("none.such", lambda problem: None, lambda problem: "only if selected by name")
    monkeypatch.setitem(BACKENDS, "peer", row)
    return "peer"


def taken(problem: Problem = HERE) -> str:
    return dispatch.choose("lmoe", problem, dispatch.requested_backend("lmoe", None))


def gpu_with(**sizes: int) -> Problem:
    return GPU._replace(sizes=GPU.sizes._replace(**sizes))


@pytest.mark.parametrize(("tokens", "first"), [(1, "cuda"), (16, "cuda"), (17, "triton"), (4096, "triton")])
def test_on_a_gpu_few_tokens_go_to_cuda_and_many_to_triton(gpu, tokens: int, first: str) -> None:
    assert taken(gpu_with(T=tokens)) == first


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("tokens", [1, 513])
def test_on_a_cpu_torch_is_taken(gpu, device: str, tokens: int) -> None:
    """Also where all the others could take the call."""
    gpu.setenv("TRITON_INTERPRET", "1")
    problem = gpu_with(T=tokens)._replace(device=torch.device(device))
    assert dispatch.choose("lmoe", problem, "triton") == "triton"
    assert dispatch.choose("lmoe", problem, "cuda") == "cuda"
    assert taken(problem) == "torch"


def test_triton_takes_up_to_256_experts(gpu) -> None:
    assert taken(gpu_with(E=256)) == "triton"
    assert taken(gpu_with(E=257)) == "torch"
    text = dispatch.explain_choice("lmoe", gpu_with(E=257), AUTO)
    assert "triton     cannot: its kernels take at most 256 experts, not 257" in text


def test_triton_takes_no_fp64_on_a_gpu(gpu) -> None:
    assert taken(GPU._replace(dtype=torch.float64)) == "torch"
    with pytest.raises(ValueError, match="'triton': its kernels take fp32, bf16 and fp16 on a GPU, not fp64"):
        dispatch.choose("lmoe", GPU._replace(dtype=torch.float64), "triton")


def taken_instead(problem: Problem = GPU) -> tuple[str, str]:
    """The backend that is taken, and what `explain` says of triton."""
    lines = dispatch.explain_choice("lmoe", problem, AUTO).splitlines()
    return taken(problem), next(line.removeprefix("  triton     ") for line in lines if line.startswith("  triton"))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)], ids=["Volta", "Turing"])
def test_triton_takes_no_gpu_before_ampere(gpu, capability: tuple[int, int]) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = f"its kernels need compute capability 8.0, not {capability[0]}.{capability[1]}"
    assert taken_instead() == ("torch", f"cannot: {reason}")
    with pytest.raises(ValueError, match=f"'triton': {re.escape(reason)}"):
        dispatch.choose("lmoe", GPU, "triton")


@pytest.mark.parametrize(
    "arch, takes",
    [(f"gfx{model}", False) for model in ("803", "900", "906", "90c", "1010", "1030")]
    + [(f"gfx{model}", True) for model in ("908", "90a", "942", "950", "1100", "1151", "1201", "1250")],
)
@pytest.mark.parametrize("features", ["", ":sramecc+:xnack-"], ids=["", "with features"])
def test_triton_takes_chips_of_amd_with_matrix_instructions(gpu, arch: str, takes: bool, features: str) -> None:
    gpu.setattr(torch.version, "hip", "7.0")
    gpu.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch + features))
    if takes:
        assert taken_instead() == ("triton", "taken: the first that can take the call")
    else:
        reason = f"cannot: its kernels need matrix instructions for bf16, which {arch} does not have"
        assert taken_instead() == ("torch", reason)


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.5.1+git0b5c", "4.0.0"])
def test_an_untested_triton_is_taken_only_by_name(gpu, version: str) -> None:
    gpu.setattr(availability, "_version_of_triton", lambda: version)
    reason = f"not taken: its kernels are tested with Triton 3.6 or later, below 4, not {version}"
    assert taken_instead() == ("torch", reason)
    assert dispatch.choose("lmoe", GPU, "triton") == "triton"


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.10.0+rocm7", "3.8.0.dev20261101", ""])
def test_a_triton_that_is_tested_or_follows_such_a_one_is_taken(gpu, version: str) -> None:
    """A build that does not say its version is taken too."""
    gpu.setattr(availability, "_version_of_triton", lambda: version)
    assert taken() == "torch"
    assert taken(GPU) == "triton"


def test_the_version_is_that_of_the_installed_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under any of the names that PyTorch's builds have."""
    triton = pytest.importorskip("triton")
    assert availability._version_of_triton().split("+")[0] == triton.__version__.split("+")[0]
    known = {"pytorch-triton-rocm": "3.6.0+rocm7.0"}

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    assert availability._version_of_triton() == "3.6.0+rocm7.0"
    known.clear()
    assert availability._version_of_triton() == ""


def test_a_gpu_without_a_c_compiler_runs_pytorch(gpu) -> None:
    gpu.setattr(availability, "_why_no_launchers", lambda: "Triton finds no C compiler")
    assert taken_instead() == ("torch", "not taken: Triton finds no C compiler")


def test_a_block_is_undone_at_its_end(peer: str) -> None:
    assert taken() == "torch"
    with use_backend(peer):
        assert taken() == peer
    assert taken() == "torch"
    with use_backend(peer):
        with use_backend(None):
            assert taken() == "torch"
        assert taken() == peer
    assert taken() == "torch"


def test_a_block_is_undone_by_an_error_in_it(peer: str) -> None:
    with suppress(ZeroDivisionError), use_backend(peer):
        raise ZeroDivisionError
    assert taken() == "torch"


def test_blocks_of_one_thread_may_end_in_any_order(peer: str) -> None:
    """Two generators that each hold a block end them in any order."""
    first, second, third = use_backend(peer), use_backend("reference"), use_backend(peer)
    for block in (first, second, third):
        block.__enter__()
    assert taken() == peer
    for block, then in ((third, "reference"), (first, "reference"), (second, "torch")):
        block.__exit__(None, None, None)
        assert taken() == then


@pytest.fixture
def threads():
    """Two threads, each of which runs one given call after another."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        yield [lambda *call, of=pool: of.submit(*call).result() for pool in (one, other)]


@pytest.mark.parametrize("leaves_first", [0, 1])
def test_overlapping_blocks_of_two_threads_leave_nothing_behind(threads, peer: str, leaves_first: int) -> None:
    names = ["reference", peer]
    blocks = [use_backend(name) for name in names]
    for thread, block in zip(threads, blocks, strict=True):
        thread(block.__enter__)
    assert [thread(taken) for thread in threads] == names
    stays = 1 - leaves_first
    threads[leaves_first](blocks[leaves_first].__exit__, None, None, None)
    assert threads[stays](taken) == names[stays]
    threads[stays](blocks[stays].__exit__, None, None, None)
    assert [taken(), *(thread(taken) for thread in threads)] == ["torch"] * 3


def test_a_thread_without_a_block_follows_the_one_entered_last(threads, peer: str) -> None:
    """Autograd's threads recompute checkpointed layers, and DataParallel's run the replicas."""
    worker, other = threads
    with use_backend(peer):
        assert worker(taken) == peer
        block = use_backend("reference")
        other(block.__enter__)
        assert worker(taken) == "reference"
        assert taken() == peer
        other(block.__exit__, None, None, None)
        assert worker(taken) == peer
    assert worker(taken) == "torch"


def test_a_block_may_end_in_another_thread(threads, peer: str) -> None:
    block = use_backend(peer)
    block.__enter__()
    threads[0](block.__exit__, None, None, None)
    assert [taken(), threads[0](taken)] == ["torch"] * 2


def _compiled(graphs: list[str]):
    """The compiled operation on random tokens; it appends the code of every compiled graph to the list."""
    torch._dynamo.reset()
    t = make_problem(Case(), torch.float64).tensors

    def keep(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    def call(block: str | None) -> None:
        with use_backend(block) if block else nullcontext():
            lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"])

    return torch.compile(call, fullgraph=True, backend=keep)


def test_a_compiled_function_follows_the_block_of_its_thread(threads) -> None:
    graphs: list[str] = []
    compiled = _compiled(graphs)

    def in_block(name: str) -> None:
        with use_backend(name):
            compiled(None)

    with use_backend("torch"):
        compiled(None)
        threads[0](in_block, "reference")
        compiled(None)  # the first graph again
        threads[0](in_block, "reference")  # the second
    assert ["'reference'" in code for code in graphs] == [False, True]


def test_a_block_within_a_compiled_function() -> None:
    graphs: list[str] = []
    _compiled(graphs)("reference")
    assert "'reference'" in graphs[0]
    assert taken() == "torch"
