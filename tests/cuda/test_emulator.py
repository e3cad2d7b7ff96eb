"""The emulator: the kernels are clean under its sanitizers, and bugs that are put into them are caught."""

from pathlib import Path

import pytest

from tools.emulator import build
from tools.emulator.bugs import BUGS, PROBLEMS, SOME_BUGS, Bug

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no g++ to compile the CUDA emulator")


QUICK = {"a barrier of the grid in a launch that is not cooperative", "coefficients held beyond a block's shared memory"}


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("cuda_emu"))


@pytest.mark.parametrize("kind", build.PROGRAMS)
@pytest.mark.parametrize(("target", "problems"), [("plain", 20), pytest.param("address", 4, marks=pytest.mark.slow)])
def test_kernels_are_clean(target: str, problems: int, kind: str, cache: Path, request: pytest.FixtureRequest) -> None:
    done = build.run_driver(build.build_driver(cache, kind, target), request.config.option.seed, problems)
    assert done.returncode == 0, done.stdout[-4000:]


def test_every_bug_has_its_place_in_the_kernels(tmp_path: Path) -> None:
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names)
    assert len(SOME_BUGS) == 12, "a name in SOME_BUGS is that of no bug"
    for number, bug in enumerate(BUGS):
        bug.plant(tmp_path / str(number))


@pytest.mark.parametrize(
    "bug", [pytest.param(b, marks=[pytest.mark.slow] * (b.name not in QUICK)) for b in SOME_BUGS], ids=str
)
def test_bug_is_caught(bug: Bug, cache: Path, tmp_path: Path) -> None:
    driver = build.build_driver(cache, bug.kind, bug.target, bug.plant(tmp_path))
    done = build.run_driver(driver, bug.first_problem, PROBLEMS)
    assert done.returncode != 0, "not caught"
    assert bug.caught_as in done.stdout, done.stdout[-4000:]
