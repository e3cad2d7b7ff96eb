"""Compile the CUDA engine's sources for a chip, and read what nvcc made of each kernel."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.inspect.machine_code import MachineCodeError
from benchmarks.model.loops import Listing, read_listing

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
FLAGS = ("-cubin", "-O3", "-std=c++17")  # as setup.py has them
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")  # that the project's tests compile for
DTYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}  # as C++ names them in symbols


class Kernel(NamedTuple):
    """A kernel's name, the dtype that it is compiled for, and its other template arguments."""

    name: str
    dtype: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}_kernel<{', '.join([self.dtype, *map(str, self.sizes)])}>"


class Built(NamedTuple):
    """What nvcc made of a kernel."""

    kernel: Kernel
    arch: str
    registers: int  # of a thread
    shared: int  # bytes, without those that a launch asks for
    text: str  # its part of `nvdisasm -hex -c`

    @property
    def listing(self) -> Listing:
        """Its instructions."""
        return _listing(self)


@cache
def _listing(built: Built) -> Listing:
    return read_listing(f"{built.kernel} for {built.arch}", built.text)


def tool(name: str) -> str | None:
    """A tool of CUDA's: of the toolkit, or of Triton, which brings its own."""
    triton = find_spec("triton")
    places = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return shutil.which(name) or next((str(place / name) for place in places if (place / name).exists()), None)


def missing_tools() -> list[str]:
    """The tools that are needed and not there."""
    return [name for name in ("nvcc", "cuobjdump", "nvdisasm") if tool(name) is None]


def nvcc_version() -> str:
    """The release that nvcc names."""
    found = re.search(r"release \S+ (V\S+)", _output("nvcc", "--version"))
    return found[1] if found else "unknown"


def kernels(archs: Sequence[str], folder: Path, dtype: str = "bf16") -> dict[str, dict[Kernel, Built]]:
    """All kernels of a dtype for each architecture. Cubins are kept in the folder, and compiled where they are not there."""
    if missing := missing_tools():
        raise MachineCodeError(
            f"{' and '.join(missing)} of the CUDA toolkit must be in PATH, to compile csrc/ and to read it"
        )
    sources = sorted(SOURCES.glob("cuda/*.cu"))
    kept = folder / _fingerprint()
    kept.mkdir(parents=True, exist_ok=True)
    pairs = [(source, arch, kept / f"{source.stem}.{arch}.cubin") for arch in archs for source in sources]
    to_do = [pair for pair in pairs if not pair[2].exists()]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda pair: _compile(*pair), to_do)
        list(tqdm(done, total=len(to_do), desc="nvcc", dynamic_ncols=True, disable=not to_do))
    found: dict[str, dict[Kernel, Built]] = {arch: {} for arch in archs}
    for _, arch, cubin in pairs:
        found[arch] |= {built.kernel: built for built in read_cubin(cubin, arch) if built.kernel.dtype == dtype}
    return found


@cache
def constant(name: str) -> int:
    """A constant of the sources, such as THREADS, which is a number there, or one shifted by another."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.rglob("*")) if path.is_file()]
    numbers = [number for text in texts for number in re.findall(rf"\b{name} = (\d+)(?: << (\d+))?[,;]", text)]
    found = {int(value) << int(shift or 0) for value, shift in numbers}
    if len(found) != 1:
        raise MachineCodeError(f"csrc must set {name} to one number, found {sorted(found)}")
    return found.pop()


def _fingerprint() -> str:
    """A name that changes with the sources and with nvcc."""
    whole = hashlib.sha256(" ".join([nvcc_version(), *FLAGS]).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("cuda/*")]):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def _compile(source: Path, arch: str, to: Path) -> None:
    part = to.with_suffix(".part")  # an interrupted nvcc leaves no cubin behind
    _output("nvcc", *FLAGS, f"-arch={arch}", f"-I{SOURCES}", str(source), "-o", str(part))
    part.rename(to)


def read_cubin(cubin: Path, arch: str) -> Iterator[Built]:
    """The kernels of a cubin."""
    usage = _output("cuobjdump", "--dump-resource-usage", str(cubin))
    numbers = re.findall(r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", usage)
    used = {name: (int(registers), int(shared)) for name, registers, shared in numbers}
    for text in re.split(r"\.section\s+", _output("nvdisasm", "-hex", "-c", str(cubin))):
        symbol = text.partition(",")[0].removeprefix(".text.")
        if text.startswith(".text.") and (kernel := kernel_of(symbol)) is not None:
            yield Built(kernel, arch, *used[symbol], text)


def kernel_of(symbol: str) -> Kernel | None:
    """The kernel of a symbol; None for other functions."""
    names = "|".join(DTYPES)
    found = re.search(rf"lmoe\d+(\w+?)_kernelI({names})((?:L[ib]\d+E)*)E", symbol)
    return found and Kernel(found[1], DTYPES[found[2]], tuple(map(int, re.findall(r"L[ib](\d+)E", found[3]))))


def _output(name: str, *arguments: str) -> str:
    done = subprocess.run([str(tool(name)), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise MachineCodeError(f"{name} failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout
