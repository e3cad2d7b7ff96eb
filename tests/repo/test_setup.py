"""setup.py: its environment variables, and a build in place as in `make gpu`, with a shell script for nvcc."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
--list-gpu-arch) echo compute_70; echo compute_75; echo compute_80; echo compute_90; exit ;;
esac
echo "$@" >> "$(dirname "$0")/calls"
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


def _make_nvcc(home: Path, script: str) -> None:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(script)
    nvcc.chmod(0o755)


@pytest.mark.parametrize("value", ["yes", "2"])
def test_an_unknown_value_of_lmoe_build_cuda_is_refused_in_one_line(value: str) -> None:
    pytest.importorskip("setuptools")
    done = _setup(LMOE_BUILD_CUDA=value)
    assert done.returncode == 1
    assert done.stderr == f"lmoe_kernels: LMOE_BUILD_CUDA must be auto, 0 or 1, got {value!r}\n"


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    _make_nvcc(tmp_path, "#!/bin/sh\necho release 13.0, compute_80 compute_90\n")
    program = "import runpy, sys; sys.argv = ['setup.py', '--version']; print(runpy.run_path('setup.py')['COMPILER'].archs)"
    done = _run("-c", program, CUDA_HOME=str(tmp_path), LMOE_BUILD_CUDA="", LMOE_CUDA_ARCHS="")
    assert done.stdout.splitlines()[-1] == "('80', '90+PTX')", done.stderr


@pytest.mark.parametrize(
    ("homes", "version"),
    [({"CUDA_HOME": "home"}, "41.0"), ({"CUDA_PATH": "path"}, "42.0"), ({"CUDA_HOME": "home", "CUDA_PATH": "path"}, "41.0")],
    ids=str,
)
def test_the_compiler_is_that_of_cuda_home_or_else_of_cuda_path(tmp_path: Path, homes: dict[str, str], version: str) -> None:
    for folder, release in (("home", "41.0"), ("path", "42.0")):
        _make_nvcc(tmp_path / folder, NVCC.replace("13.0", release))
    variables = {"CUDA_HOME": "", "CUDA_PATH": ""} | {name: str(tmp_path / folder) for name, folder in homes.items()}
    program = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']; print(runpy.run_path('setup.py')['COMPILER'].version)"
    )
    done = _run("-c", program, LMOE_BUILD_CUDA="", **variables)
    assert done.stdout.splitlines()[-1:] == [version], done.stderr


@pytest.mark.parametrize("archs", ["70", "75+PTX", "80;70", "100", "ampere", "75a", "80a", "90f", "90b", "100a", "90a;9a"])
def test_an_architecture_without_bf16_or_unknown_to_the_compiler_is_refused(tmp_path: Path, archs: str) -> None:
    _make_nvcc(tmp_path, NVCC)
    done = _setup(CUDA_HOME=str(tmp_path), LMOE_BUILD_CUDA="", LMOE_CUDA_ARCHS=archs)
    assert done.returncode == 1
    got = archs.split(";")[-1]
    assert done.stderr == f"lmoe_kernels: LMOE_CUDA_ARCHS must name some of 80, 90 (nvcc 13.0), got {got!r}\n"


def test_architectures_whose_code_runs_on_one_chip_or_one_family(tmp_path: Path) -> None:
    """nvcc compiles for 90a and 100f, too, but lists plain numbers only."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    listing = NVCC.replace("echo compute_90;", "echo compute_90; echo compute_100; echo compute_120;")
    done = _build(tmp_path, listing, LMOE_CUDA_ARCHS="80; 90a;100f;120a+PTX")
    assert done.returncode == 0, done.stderr
    assert _record(tmp_path)["archs"] == "80 90a 100f 120a+PTX"
    for call in _nvcc_calls(tmp_path)[0]:
        assert [word for word in call.split() if word.startswith("arch=")] == [
            "arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_100f,code=sm_100f",
            "arch=compute_120a,code=sm_120a", "arch=compute_120a,code=compute_120a",
        ]  # fmt: skip


def test_a_required_compiler_that_is_missing_is_an_error_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = _setup(LMOE_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"lmoe_kernels: LMOE_BUILD_CUDA=1, but CUDA_HOME has no {tmp_path / 'bin' / 'nvcc'}\n"
    done = _setup(LMOE_BUILD_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "the CUDA extension is left out: CUDA_HOME has no" in done.stdout


def _build(tree: Path, nvcc: str = NVCC, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build in place in a copy of the sources that holds the extension of an earlier build."""
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("lmoe_kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"))
    (tree / "lmoe_kernels" / LIBRARY).write_text("of an earlier build")
    _make_nvcc(tree / "cuda", nvcc)
    own = {name: value for name, value in os.environ.items() if name not in ("CXX", "MAX_JOBS")}
    environment = {**own, "CUDA_HOME": str(tree / "cuda"), "ERROR": "", **environment}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def _nvcc_calls(tree: Path) -> tuple[list[str], str]:
    """The arguments with which nvcc compiled each source, and those with which it linked."""
    calls = (tree / "cuda" / "bin" / "calls").read_text().splitlines()
    return [call for call in calls if " -c " in call], next(call for call in calls if " -shared " in call)


def _record(tree: Path) -> dict[str, str]:
    return json.loads((tree / "lmoe_kernels" / "_build_info.json").read_text())


def test_a_build_is_recorded_next_to_its_sources(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    done = _build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert _record(tmp_path) == {"cuda": "built", "nvcc": "13.0", "archs": "80 90+PTX"}
    assert (tmp_path / "lmoe_kernels" / LIBRARY).read_text() == "compiled\n"
    compiled, linked = _nvcc_calls(tmp_path)
    assert len(compiled) == len([*tmp_path.glob("csrc/cuda/*.cu"), *tmp_path.glob("csrc/*.cpp")])
    for call in (*compiled, linked):  # machine code for every architecture, and PTX for later GPUs
        assert [word for word in call.split() if word.startswith("arch=")] == [
            "arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90",
        ]  # fmt: skip
        assert "-ccbin" not in call
    assert "-cudart static" in linked, "the extension must not depend on an installed CUDA runtime"


def test_the_build_uses_cxx_and_max_jobs(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "ninja.py").write_text(f"BIN_DIR = {str(modules)!r}")
    ninja = modules / "ninja"
    ninja.write_text(
        '#!/bin/sh\necho "$@" > "$(dirname "$0")/called"; grep ^flags "$2/build.ninja" > "$(dirname "$0")/flags"'
    )
    ninja.chmod(0o755)
    done = _build(tmp_path, PYTHONPATH=str(modules), CXX="/opt/other/g++", MAX_JOBS="3")
    assert done.returncode == 0, done.stderr
    assert (modules / "called").read_text().split()[2:] == ["-j", "3"]
    assert "-ccbin /opt/other/g++" in (modules / "flags").read_text()


def test_a_failed_build_is_recorded_and_leaves_no_older_one(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    done = _build(tmp_path, ERROR="fatal error: Python.h: No such file or directory")
    assert done.returncode == 0, done.stderr
    reason = "nvcc 13.0 failed: fatal error: Python.h: No such file or directory"
    assert f"the CUDA extension is left out: {reason}" in done.stdout
    assert _record(tmp_path) == {"cuda": reason}
    assert not (tmp_path / "lmoe_kernels" / LIBRARY).exists()


def test_a_required_build_that_fails_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    done = _build(tmp_path, ERROR="fatal error: Python.h: No such file or directory", LMOE_BUILD_CUDA="1")
    assert done.returncode != 0
    reason = "nvcc 13.0 failed: fatal error: Python.h: No such file or directory"
    assert done.stderr.splitlines()[-1] == f"lmoe_kernels: LMOE_BUILD_CUDA=1, but {reason}"


def test_a_missing_requirement_of_the_build_is_recorded(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "ninja.py").write_text("raise ImportError(\"No module named 'ninja'\")")
    done = _build(tmp_path, PYTHONPATH=str(modules))
    assert done.returncode == 0, done.stderr
    assert _record(tmp_path) == {"cuda": "the build needs ninja and pybind11: No module named 'ninja'"}
