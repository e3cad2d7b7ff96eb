"""setup.py as `make gpu` runs it, in place, with a compiler that is a script: what is recorded and what is left behind."""

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


def _build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build in place in a copy of the sources that holds the extension of an earlier build."""
    pytest.importorskip("setuptools", "77")
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
