# SPDX-License-Identifier: Apache-2.0
"""Builds the extension `lmoe_kernels._cuda` where nvcc is found; metadata is in pyproject.toml. No torch is needed here.

LMOE_BUILD_CUDA   auto (default): build it if possible, else leave it out; 1: an error if it cannot be built; 0: never
LMOE_CUDA_ARCHS   for example "80;90a;100+PTX"; default: those of 80, 90, 100 and 120 that nvcc knows, with PTX of the last
CUDA_HOME, CUDA_PATH, CXX, MAX_JOBS   as usual

pip hides the output of a build. The result is therefore recorded in lmoe_kernels/_build_info.json, and
`python -m lmoe_kernels.info` shows it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
ARCHS = ("80", "90", "100", "120")
BUILD_CUDA = os.environ.get("LMOE_BUILD_CUDA") or "auto"


@dataclass(frozen=True)
class Compiler:
    """nvcc and the architectures that it compiles for."""

    path: str
    version: str
    archs: tuple[str, ...]  # "90", or "90+PTX"

    @property
    def flags(self) -> list[str]:
        """Its options."""
        flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-I", str(ROOT / "csrc")]
        for arch in self.archs:
            number = arch.removesuffix("+PTX")
            flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if arch != number:
                flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        return flags


def find_compiler() -> Compiler | str:
    """nvcc, or why there is none."""
    if BUILD_CUDA not in ("auto", "0", "1"):
        raise SystemExit(f"lmoe_kernels: LMOE_BUILD_CUDA must be auto, 0 or 1, got {BUILD_CUDA!r}")
    if BUILD_CUDA == "0":
        return "LMOE_BUILD_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if path is None or not Path(path).exists():
        return "no nvcc in PATH or CUDA_HOME" if path is None else f"CUDA_HOME has no {path}"
    version = re.search(r"release ([\d.]+)", _output(path, "--version"))
    if version is None:
        return f"{path} --version prints no release"
    known = re.findall(r"compute_(\w+)", _output(path, "--list-gpu-arch"))
    wanted = os.environ.get("LMOE_CUDA_ARCHS", "").strip(" ;")
    if not wanted:
        archs = [arch for arch in ARCHS if arch in known]
        return Compiler(path, version[1], (*archs[:-1], f"{archs[-1]}+PTX")) if archs else f"nvcc {version[1]} is too old"
    archs = [arch.strip() for arch in wanted.split(";") if arch.strip()]
    for arch in archs:
        # nvcc lists 90 but not 90a, whose code runs on 90 alone; such names exist from 90 on, those with f from 100 on
        name = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch)
        if name is None or name[1] not in known or int(name[1]) < {"": 80, "a": 90, "f": 100}[name[2]]:
            usable = ", ".join(name for name in known if int(re.sub(r"\D", "", name)) >= 80)
            raise SystemExit(f"lmoe_kernels: LMOE_CUDA_ARCHS must name some of {usable} (nvcc {version[1]}), got {arch!r}")
    return Compiler(path, version[1], tuple(archs))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


class BuildPython(build_py):
    """Records why there is no extension."""

    def run(self) -> None:
        """Build the package and record the reason in it."""
        super().run()
        if isinstance(COMPILER, str):
            record(ROOT if self.editable_mode else Path(self.build_lib), {"cuda": COMPILER})


class BuildExtension(build_ext):
    """Compiles with nvcc under ninja."""

    def run(self) -> None:
        """Build the extension, next to its sources if the build is editable or in place."""
        self.next_to_sources = self.editable_mode or self.inplace  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build it and record the result; raise if it is required and cannot be built."""
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        failure = self.run_ninja(ext, out)
        info = {"cuda": "built", "nvcc": COMPILER.version, "archs": " ".join(COMPILER.archs)}
        if failure is not None:
            for stale in (out, ROOT / "lmoe_kernels" / out.name) if self.next_to_sources else (out,):
                stale.unlink(missing_ok=True)
            info = {"cuda": failure}
            print(f"lmoe_kernels: the CUDA extension is left out: {failure}")
            if BUILD_CUDA == "1":
                raise SystemExit(f"lmoe_kernels: LMOE_BUILD_CUDA=1, but {failure}")
        for root in {out.parents[1], ROOT} if self.next_to_sources else {out.parents[1]}:
            record(root, info)

    def run_ninja(self, ext: Extension, out: Path) -> str | None:
        """Build the extension; return None, or why it failed."""
        try:  # imported here: commands that read metadata must not need them
            import ninja
            import pybind11
        except ImportError as error:
            return f"the build needs ninja and pybind11: {error}"
        temporary = Path(self.build_temp).resolve() / ext.name
        temporary.mkdir(parents=True, exist_ok=True)
        includes = ["-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]
        host = ["-ccbin", os.environ["CXX"]] if "CXX" in os.environ else []
        lines = [
            f"flags = {shlex.join([*COMPILER.flags, *includes, *host])}",
            "rule compile",
            f"  command = {COMPILER.path} -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {COMPILER.path} -cudart static -shared $flags $in -o $out",
        ]
        objects = [temporary / f"{Path(source).name}.o" for source in ext.sources]
        lines += [f"build {to}: compile {ROOT / source}" for source, to in zip(ext.sources, objects, strict=True)]
        lines.append(f"build {out}: link {' '.join(map(str, objects))}")
        (temporary / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(temporary), *jobs]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode == 0:
            return None
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower() or "fatal" in line.lower()]
        return f"nvcc {COMPILER.version} failed: {(errors or ['no error was printed'])[0].strip()}"


def record(root: Path, info: dict[str, str]) -> None:
    """Write lmoe_kernels/_build_info.json."""
    path = root / "lmoe_kernels" / "_build_info.json"
    path.write_text(json.dumps(info, indent=2) + "\n")


COMPILER = find_compiler()
if isinstance(COMPILER, str):
    if BUILD_CUDA == "1":
        raise SystemExit(f"lmoe_kernels: LMOE_BUILD_CUDA=1, but {COMPILER}")
    print(f"lmoe_kernels: the CUDA extension is left out: {COMPILER}")
SOURCES = ["csrc/bindings.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))]
setup(
    license="Apache-2.0",
    ext_modules=[] if isinstance(COMPILER, str) else [Extension("lmoe_kernels._cuda", SOURCES, optional=True)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
