"""Fixtures that the whole suite shares: fresh random inputs, the backends under test, watched allocations."""

import random
from importlib.util import find_spec

import pytest
import torch

from tests.triton_interpreter import interpret
from tests.watch import AllocationWatch

HAS_TRITON = find_spec("triton") is not None
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")),
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
    torch.manual_seed(f"{request.config.option.seed} {request.node.nodeid}".__hash__() & 0xFFFFFFFF)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that computes with its own code, in turn."""
    return request.param


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch):
    """Tensors made empty during the test are full of NaN and stand between canaries, which are looked at when it ends."""
    allocations = AllocationWatch()
    allocations.install(monkeypatch)
    yield allocations
    allocations.check()
