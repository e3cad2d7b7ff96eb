"""setup.py: what it is told by the environment, and what it answers. Nothing is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
