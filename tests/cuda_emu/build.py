"""Compiles csrc/ with g++ against the emulator, once for each state of the sources."""

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

EMULATOR = Path(__file__).parent
CSRC = EMULATOR.parents[1] / "csrc"
LAUNCHERS = tuple(sorted((CSRC / "cuda").glob("*.cu")))
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread",),
}


def compile_emulated(cache: Path, name: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> Path:
    """The path of a program or library made of these sources; compiled only where the cache does not hold it yet."""
    assert COMPILER is not None
    command = [COMPILER, *FLAGS, f"-I{CSRC}", f"-I{EMULATOR}", *flags]
    state = hashlib.sha256(" ".join(map(str, (*command, *sources))).encode())
    for path in sorted([*CSRC.rglob("*.*"), *EMULATOR.glob("*.h"), *sources]):
        state.update(path.read_bytes())
    folder = cache / state.hexdigest()[:16]
    binary = folder / name
    if not binary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(2) as pool:
            for done in [
                pool.submit(_run, *command, "-x", "c++", "-c", str(source), "-o", str(to))
                for source, to in zip(sources, objects, strict=True)
            ]:
                done.result()
        unfinished = folder / f"{name}.unfinished"
        _run(*command, *map(str, objects), "-o", str(unfinished))
        unfinished.rename(binary)
    return binary


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


def emulated_extension(cache: Path, seed: int) -> ModuleType:
    """`_cuda` as it is shipped, bindings and launchers included, on the emulator; the seed draws its first schedule."""
    import pybind11

    include = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-shared")
    path = compile_emulated(cache, "_cuda.so", (CSRC / "bindings.cpp", EMULATOR / "control.cpp", *LAUNCHERS), include)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ctypes.CDLL(str(path)).emu_set_schedule(ctypes.c_uint64(seed), ctypes.c_int(seed % 3 == 0))
    return module
