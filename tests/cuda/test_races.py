"""The CUDA kernels under ThreadSanitizer; `make racecheck` runs these tests, many more calls, and every seeded bug."""

from pathlib import Path

import pytest

from tools.emulator import build
from tools.emulator.bugs import BUGS

# Calls of the driver with few tokens: races do not depend on sizes, and each emulated thread costs time. In one pass the
# bf16 problem has several steps of v, the fp32 problem several tiles of features, too.
PATHS = {"stages in bf16": 8, "one pass in bf16": 56, "one pass in fp32": 51, "parts in fp32": 20, "decode in fp16": 41}
PRODUCTS = {"shrink from two buffers": 6, "expand over several tiles": 34, "wgrad": 8}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if build.COMPILER is None:
        pytest.skip("no g++ to compile the CUDA emulator")
    if not build.has_sanitizer("thread", tmp_path_factory.mktemp("sanitizer")):
        pytest.skip("the compiler has no thread sanitizer that works here")
    return Path(request.config.cache.mkdir("cuda_emu"))


@pytest.mark.parametrize("path", PATHS)
def test_no_kernel_has_a_data_race(path: str, cache: Path) -> None:
    done = build.run_driver(build.build_driver(cache, "calls", "thread"), PATHS[path], 1)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_product_has_a_data_race(product: str, cache: Path) -> None:
    done = build.run_driver(build.build_driver(cache, "products", "thread"), PRODUCTS[product], 1)
    assert done.returncode == 0, done.stdout[-4000:]


def test_dropout_has_no_data_race(cache: Path) -> None:
    done = build.run_driver(build.build_driver(cache, "dropout", "thread"), 1, 3)
    assert done.returncode == 0, done.stdout[-4000:]


def test_stacked_mixtures_have_no_data_race(cache: Path) -> None:
    done = build.run_driver(build.build_driver(cache, "stacked", "thread"), 1, 3)
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_race_is_seen(cache: Path, tmp_path: Path) -> None:
    bug = next(bug for bug in BUGS if bug.name == "no barrier of the grid")
    done = build.run_driver(build.build_driver(cache, "calls", "thread", bug.plant(tmp_path)), PATHS["decode in fp16"], 1)
    assert done.returncode != 0, "not caught"
    assert "ThreadSanitizer: data race" in done.stdout, done.stdout[-4000:]
