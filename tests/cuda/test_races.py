"""The CUDA kernels under ThreadSanitizer, for seconds; `make racecheck` takes minutes and plants every seeded bug."""

from pathlib import Path

import pytest

from tools.emulator import build
from tools.emulator.bugs import BUGS

# Problems of the driver with few tokens: races do not depend on sizes, and each emulated thread costs time.
PATHS = {"stages in bf16": 8, "one pass in bf16": 13, "parts in fp32": 20, "decode in fp16": 41}


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if build.COMPILER is None:
        pytest.skip("no g++ to compile the CUDA emulator")
    if not build.has_sanitizer("thread", tmp_path_factory.mktemp("sanitizer")):
        pytest.skip("the compiler has no thread sanitizer that works here")
    return Path(request.config.cache.mkdir("cuda_emu"))


@pytest.mark.parametrize("path", PATHS)
def test_no_kernel_has_a_data_race(path: str, cache: Path) -> None:
    done = build.run_driver(build.build_driver(cache, "thread"), PATHS[path], 1)
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_race_is_seen(cache: Path, tmp_path: Path) -> None:
    bug = next(bug for bug in BUGS if bug.name == "no barrier of the grid")
    done = build.run_driver(build.build_driver(cache, "thread", bug.plant(tmp_path)), PATHS["decode in fp16"], 1)
    assert done.returncode != 0, "not caught"
    assert "ThreadSanitizer: data race" in done.stdout, done.stdout[-4000:]
