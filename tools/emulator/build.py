"""Compiles csrc/ with g++ for the emulator; results are cached by the state of the sources."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from filelock import FileLock

PROGRAMS = {
    "calls": "driver.cpp",
    "products": "products.cpp",
    "dropout": "dropout.cpp",
    "stacked": "stacked.cpp",
}  # by the kind of their problems
# Launchers that a kind does not need; all need device.cu, which asks about the kernel of decode.cu.
OF_CALLS = ("backward.cu", "forward.cu", "fused.cu", "mix.cu")
PRODUCTS = ("expand.cu", "shrink.cu", "wgrad.cu")
SKIPPED = {
    "calls": ("stacked.cu",),
    "products": (*OF_CALLS, "dropout.cu", "stacked.cu"),
    "dropout": (*OF_CALLS, *PRODUCTS, "stacked.cu"),
    "stacked": (*OF_CALLS, *PRODUCTS, "dropout.cu"),
}
EMULATOR = Path(__file__).parent
CSRC = EMULATOR.parents[1] / "csrc"
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
TARGETS = {
    "plain": ("-O1",),
    # -O0: here compiling takes longer than running
    "quick": ("-O0",),
    "address": ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}


def build_extension(cache: Path, seed: int) -> ModuleType:
    """The module `_cuda` with its own bindings and launchers, on the emulator; the seed selects the first schedule."""
    import pybind11

    include = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-shared")
    path = _compile(
        cache, "_cuda.so", [CSRC / "bindings.cpp", EMULATOR / "control.cpp"], (*TARGETS["plain"], *include), CSRC
    )
    ctypes.CDLL(str(path)).emu_set_schedule(ctypes.c_uint64(seed), ctypes.c_int(seed % 3 == 0))
    return load_extension(path)


def load_extension(path: Path) -> ModuleType:
    """A compiled module `_cuda`. A copy of the file in another folder is a module of its own, which launched nothing yet."""
    # pybind11 returns the first module of a name again; only the name's last part must be that in the file
    spec = importlib.util.spec_from_file_location(f"{path.parent}._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(cache: Path, kind: str, target: str, csrc: Path = CSRC) -> Path:
    """The program that runs problems of a kind over these sources."""
    return _compile(cache, f"{kind}_{target}", [EMULATOR / PROGRAMS[kind]], TARGETS[target], csrc, SKIPPED.get(kind, ()))


def has_sanitizer(target: str, folder: Path) -> bool:
    """Whether the compiler has the sanitizer of a target, and its programs run on this machine."""
    program = folder / f"nothing_{target}"
    command = [str(COMPILER), *TARGETS[target], "-x", "c++", "-", "-o", str(program)]
    made = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
    return made.returncode == 0 and subprocess.run([str(program)], capture_output=True).returncode == 0


def run_driver(driver: Path, first: int, problems: int) -> subprocess.CompletedProcess[str]:
    """Run problems first, first + 1, ...; a sanitizer stops at its first finding. Exit status 0: no finding, no failure."""
    return subprocess.run(
        [str(driver), str(first), str(problems)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )


def _compile(
    cache: Path, name: str, sources: list[Path], flags: tuple[str, ...], csrc: Path, skipped: tuple[str, ...] = ()
) -> Path:
    """The program or library of these sources and all launchers but those skipped, compiled unless it is in the cache."""
    assert COMPILER is not None
    sources = [*sources, *sorted(path for path in csrc.glob("cuda/*.cu") if path.name not in skipped)]
    strict = ("-Werror",) if csrc == CSRC else ()
    cache.mkdir(parents=True, exist_ok=True)
    options = (*FLAGS, *flags)
    command = [COMPILER, *options, *strict, f"-I{csrc}", f"-I{EMULATOR}"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(cache, command, options, source), sources))
    state = hashlib.sha256(" ".join(map(str, objects)).encode())
    binary = cache / f"{state.hexdigest()[:16]}.{name}"
    return _made(binary, [*command, *map(str, objects)])


def _object(cache: Path, command: list[str], options: tuple[str, ...], source: Path) -> Path:
    """One compiled source, cached by the preprocessor's output: a change recompiles only the sources that include it."""
    text = _run([*command, "-x", "c++", "-E", "-P", str(source)])
    state = hashlib.sha256("\n".join((*options, text)).encode()).hexdigest()[:16]
    return _made(cache / f"{state}.o", [*command, "-x", "c++", "-c", str(source)])


def _made(path: Path, command: list[str]) -> Path:
    """The command's output at this path. One process runs the command, others wait for it."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            _run([*command, "-o", str(unfinished)])
            unfinished.rename(path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
    return done.stdout
