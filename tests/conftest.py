"""Fixtures of the whole suite: random inputs, the backends under test, watched allocations."""

import random
import shutil
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
BACKENDS = [name for name in dispatch.BACKENDS if name != "reference"]  # those that are compared with the reference
PLANS = [*plans.PLANS, *((name, "only plan") for name in BACKENDS if name not in dict(plans.PLANS))]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat a run: the seed in its header")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)
    if HAS_TRITON and config.option.markexpr not in ("gpu", "vllm"):
        interpret()  # before a test module imports Triton


def pytest_report_header(config: pytest.Config) -> str:
    return f"inputs drawn with --seed {config.option.seed}, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed each test differently in each run; `--seed` repeats the inputs of a run."""
    torch.manual_seed(zlib.crc32(f"{request.config.option.seed} {request.node.nodeid}".encode()))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend except the reference, in turn."""
    _make_available(request.param, request)
    if request.param == "cuda" and request.node.callspec.params.get("dtype") is torch.float64:
        pytest.skip("the cuda backend does not take float64")
    return request.param


@pytest.fixture(params=PLANS, ids=": ".join)
def every_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each backend except the reference, forced to use each of its plans in turn."""
    name, plan = request.param
    _make_available(name, request)
    plans.force(name, plan, monkeypatch)
    return name


def _make_available(backend: str, request: pytest.FixtureRequest) -> None:
    """Let a backend run on CPU tensors until the test ends, or skip the test."""
    if backend == "cuda":
        request.getfixturevalue("emulated_cuda")
    elif backend == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")


@pytest.fixture
def exact(backend: str) -> torch.dtype:
    """The widest dtype that the backend takes, for tests of properties that do not depend on the dtype."""
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
    """The cuda backend on CPU tensors: the emulated library replaces the compiled one."""
    return _emulate(emulated_extension, monkeypatch)


@pytest.fixture
def unused_cuda(emulated_extension: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The same with a copy of the library that nothing has called yet."""
    copy = shutil.copy(str(emulated_extension.__file__), tmp_path)
    return _emulate(build.load_extension(Path(copy)), monkeypatch)


def _emulate(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def why_not(problem: Problem) -> str | None:
        return None if problem.dtype in extension.DTYPES else availability.why_not(problem)

    monkeypatch.setattr(extension, "library", lambda: library)
    monkeypatch.setattr(extension, "queue", lambda tensor: (0, 0))
    monkeypatch.setattr(extension, "device_of", lambda index: extension.Device(*library.properties(index)))
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", dispatch.BACKENDS["cuda"]._replace(why_not=why_not))
    return library


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch):
    """Empty tensors made during the test are full of NaN and lie between canaries, which are checked at its end."""
    allocations = AllocationWatch()
    allocations.install(monkeypatch)
    yield allocations
    allocations.check()
