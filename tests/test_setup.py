"""setup.py: what the environment tells it, and building in place as `make gpu` does, with a compiler that is a script."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
--list-gpu-arch) echo compute_80; echo compute_90; exit ;;
esac
test -n "$ERROR" && { echo "$ERROR" >&2; exit 1; }
while test $# -gt 0; do
    case "$1" in
    -MF) echo "x:" > "$2" ;;
    -o) echo compiled > "$2" ;;
    esac
    shift
done
"""


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command, variables = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


def _setup(**environment: str) -> subprocess.CompletedProcess:
    return _run("setup.py", "--version", **environment)


@pytest.mark.parametrize("wish", ["yes", "2"])
def test_a_wish_that_is_none_is_refused_in_one_line(wish: str) -> None:
    pytest.importorskip("setuptools")
    done = _setup(LMOE_BUILD_CUDA=wish)
    assert done.returncode == 1
    assert done.stderr == f"lmoe_kernels: LMOE_BUILD_CUDA must be auto, 0 or 1, got {wish!r}\n"


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 13.0, compute_80 compute_90\n")
    nvcc.chmod(0o755)
    program = "import runpy, sys; sys.argv = ['setup.py', '--version']; print(runpy.run_path('setup.py')['COMPILER'].archs)"
    done = _run("-c", program, CUDA_HOME=str(tmp_path), LMOE_BUILD_CUDA="", LMOE_CUDA_ARCHS="")
    assert done.stdout.splitlines()[-1] == "('80', '90+PTX')", done.stderr


def test_a_compiler_that_is_asked_for_and_missing_is_an_error_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = _setup(LMOE_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"lmoe_kernels: LMOE_BUILD_CUDA=1, but CUDA_HOME has no {tmp_path / 'bin' / 'nvcc'}\n"
    done = _setup(LMOE_BUILD_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "the CUDA extension is left out: CUDA_HOME has no" in done.stdout


def _build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build in place in a copy of the sources that holds the extension of an earlier build."""
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("lmoe_kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"))
    (tree / "lmoe_kernels" / LIBRARY).write_text("of an earlier build")
    nvcc = tree / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tree / "cuda"), "ERROR": "", **environment}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def _record(tree: Path) -> dict[str, str]:
    return json.loads((tree / "lmoe_kernels" / "_build_info.json").read_text())


def test_a_build_is_recorded_beside_its_sources(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    done = _build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert _record(tmp_path) == {"cuda": "built", "nvcc": "13.0", "archs": "80 90+PTX"}
    assert (tmp_path / "lmoe_kernels" / LIBRARY).read_text() == "compiled\n"


def test_a_failed_build_is_recorded_and_leaves_no_older_one(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    done = _build(tmp_path, ERROR="fatal error: Python.h: No such file or directory")
    assert done.returncode == 0, done.stderr
    reason = "nvcc 13.0 failed: fatal error: Python.h: No such file or directory"
    assert f"the CUDA extension is left out: {reason}" in done.stdout
    assert _record(tmp_path) == {"cuda": reason}
    assert not (tmp_path / "lmoe_kernels" / LIBRARY).exists()


def test_a_missing_requirement_of_the_build_is_told(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "ninja.py").write_text("raise ImportError(\"No module named 'ninja'\")")
    done = _build(tmp_path, PYTHONPATH=str(modules))
    assert done.returncode == 0, done.stderr
    assert _record(tmp_path) == {"cuda": "the build needs ninja and pybind11: No module named 'ninja'"}
