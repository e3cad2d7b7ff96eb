"""Fixtures that the whole suite shares: fresh random inputs, the backends under test, watched allocations."""

import random
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lmoe_kernels import dispatch
from lmoe_kernels.backends.cuda import availability, extension
from lmoe_kernels.options import Problem
from tests import plans
from tools.emulator import build
from tools.interpreter.bf16 import interpret
from tools.watch import AllocationWatch

HAS_TRITON = find_spec("triton") is not None
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")),
    "cuda",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat a run: the seed that its header shows")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    if HAS_TRITON and config.option.markexpr != "gpu":
        interpret()  # before a test module imports Triton


def pytest_report_header(config: pytest.Config) -> str:
    return f"inputs drawn with --seed {config.option.seed}, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test draws inputs that differ from run to run and from test to test, and can be drawn again."""
    torch.manual_seed(zlib.crc32(f"{request.config.option.seed} {request.node.nodeid}".encode()))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that computes with its own code, in turn."""
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
        if request.node.callspec.params.get("dtype") is torch.float64:
            pytest.skip("the cuda backend does not take float64")
    return request.param


@pytest.fixture(params=plans.PLANS, ids=": ".join)
def every_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each backend that computes with its own code, made to take each of its plans in turn."""
    name, plan = request.param
    if name == "cuda":
        request.getfixturevalue("emulated_cuda")
    if name == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    plans.force(name, plan, monkeypatch)
    return name


@pytest.fixture
def exact(backend: str) -> torch.dtype:
    """The widest dtype that the backend takes, for tests of what holds whatever the dtype."""
    return torch.float32 if backend == "cuda" else torch.float64


@pytest.fixture(scope="session")
def emulated_extension(request: pytest.FixtureRequest) -> ModuleType:
    """The CUDA extension compiled for the CPU emulator of tools/emulator."""
    if build.COMPILER is None:
        pytest.skip("no g++ to compile the CUDA emulator")
    cache = Path(request.config.cache.mkdir("cuda_emu"))
    return build.build_extension(cache, request.config.option.seed)


@pytest.fixture
def emulated_cuda(emulated_extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The cuda backend on CPU tensors: its launcher gets the emulated library in the place of the compiled one."""

    def why_not(problem: Problem) -> str | None:
        return None if problem.dtype in extension.DTYPES else availability.why_not(problem)

    monkeypatch.setattr(extension, "library", lambda: emulated_extension)
    monkeypatch.setattr(extension, "queue", lambda tensor: (0, 0))
    monkeypatch.setattr(extension, "processors", emulated_extension.processors)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", dispatch.BACKENDS["cuda"]._replace(why_not=why_not))
    return emulated_extension


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch):
    """Tensors made empty during the test are full of NaN and stand between canaries, which are looked at when it ends."""
    allocations = AllocationWatch()
    allocations.install(monkeypatch)
    yield allocations
    allocations.check()
