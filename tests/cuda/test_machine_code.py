"""The machine code of every CUDA kernel for every target: no spills, no stack, tensor cores, wide copies, lean loops.

And of the code around them: it calls nothing that exists on the device alone.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmoe_kernels.backends.cuda import configs, extension

pytest.importorskip("triton")  # brings the model's reader of instructions

from benchmarks.model import steps
from benchmarks.model.cubins import DTYPES, TARGETS, Built, Kernel, kernel_of, missing_tools, read_cubin, tool
from benchmarks.model.kernels import Machine
from benchmarks.model.loops import find_step

CSRC = Path(__file__).parents[2] / "csrc"
# `make racecheck` reads the code for the newer two: to compile and read it takes two minutes
READ = [pytest.param(target, marks=[pytest.mark.slow] * (target in TARGETS[2:])) for target in TARGETS]
WIDTHS = (64, 128, 144)  # columns of a product's tile
OF_ANY_WIDTH = ("forward", "shrink", "wgrad_bwd")
PRODUCTS = (*OF_ANY_WIDTH, "expand", "expand_walk")
WRITERS = ("forward", "expand", "expand_walk")  # of whole rows of y and dx
MIXES = ("mix_fwd", "mix_bwd")
OF_FEW_TOKENS = ("decode_fwd", "stacked")
KERNELS = (*PRODUCTS, *MIXES, "wgrad_sum_bwd", *OF_FEW_TOKENS, "dropout")
INSTANCES = {(kernel, (width,)) for kernel in OF_ANY_WIDTH for width in WIDTHS}  # with the sizes that they are compiled for
INSTANCES |= {(kernel, (vector, kept)) for kernel in MIXES for vector in (1, 4) for kept in (0, 1)}
INSTANCES |= {("dropout", (aligned,)) for aligned in (0, 1)}
INSTANCES |= {(kernel, ()) for kernel in ("expand", "expand_walk", "wgrad_sum_bwd", *OF_FEW_TOKENS)}
COMPILED = {Kernel(name, dtype, sizes) for name, sizes in INSTANCES for dtype in DTYPES.values()}
# The most instructions of a warp in a step of a main loop, for each of its tensor-core instructions: in a tile of 64
# columns, in a wider one, and in the loop over the features of y or dx. nvcc 13.0, 2026-11.
MOST_INSTRUCTIONS = {
    "sm_80": (5.2, 3.6, 3.8), "sm_90": (5.2, 3.6, 3.8), "sm_100": (5.2, 3.2, 4.0), "sm_120": (5.2, 3.9, 4.6),
}  # fmt: skip

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason="no nvcc, or no cuobjdump and nvdisasm")


@pytest.fixture(scope="module", params=READ)
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(target: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The built extension where it holds the target's code of these sources, else an object of each source."""
    built = _built_extension(target)
    if built is not None:
        return [built]
    folder, code = tmp_path_factory.mktemp("objects"), f"arch={target.replace('sm', 'compute')},code={target}"

    def compile_one(source: Path) -> Path:
        path = folder / f"{source.stem}.o"
        command = [str(tool("nvcc")), "-c", "-gencode", code, "-O3", "-std=c++17", f"-I{CSRC}", str(source), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return path

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sorted(CSRC.glob("cuda/*.cu"))))


@pytest.fixture(scope="module")
def cubins(compiled: list[Path], target: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The target's cubins."""
    folder = tmp_path_factory.mktemp("cubins")
    for path in compiled:
        command = [str(tool("cuobjdump")), "--extract-elf", f".{target}.", str(path)]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
    return sorted(folder.glob(f"*.{target}.cubin"))


def _vector_loads(code: str) -> list[str]:
    return re.findall(r"\bLDG?\.E\S*\.128", code)


def _built_extension(target: str) -> Path | None:
    """The extension, where it holds the target's code and is younger than all of its sources."""
    sources = [path for path in CSRC.rglob("*") if path.is_file()]
    archs = extension.build_info().get("archs", "").replace("+PTX", "").split()
    libraries = extension.BUILD_INFO.parent.glob("_cuda.*.so") if target.removeprefix("sm_") in archs else ()
    last_change = max(path.stat().st_mtime for path in sources)
    return next((path for path in libraries if path.stat().st_mtime > last_change), None)


def test_host_code_calls_nothing_that_exists_on_the_device_alone(compiled: list[Path]) -> None:
    """nvcc accepts such a call in a template or a generic lambda, and compiles it to one of `exit(1)`.

    A process that runs it ends without a message. The emulator cannot see this, since there all functions are the host's.
    """
    undefined = set()
    for path in compiled:
        command = ["nm", "--undefined-only", *["--dynamic"] * (path.suffix == ".so"), str(path)]
        listed = subprocess.run(command, check=True, capture_output=True, text=True)
        undefined |= {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    assert "__cxa_throw" in undefined, "the names of functions that are not the library's own were not read"
    assert "exit" not in undefined


def test_no_kernel_spills_or_uses_a_stack(cubins: list[Path]) -> None:
    usage = {}
    for cubin in cubins:
        command = [str(tool("cuobjdump")), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for symbol, stack, local in re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", text):
            usage[kernel_of(symbol)] = (int(stack), int(local))
    assert set(usage) == COMPILED
    assert not {kernel: used for kernel, used in usage.items() if used != (0, 0)}


def test_instructions(target: str, cubins: list[Path]) -> None:
    """One test, because disassembling the kernels takes most of its time."""
    builds = [built for cubin in cubins for built in read_cubin(cubin, target)]
    assert {built.kernel for built in builds} == COMPILED
    for one in builds:
        _assert_kinds_of_instructions(one)
    products = [built for built in builds if built.kernel.name in PRODUCTS and built.kernel.dtype != "fp32"]
    _assert_few_instructions_in_a_step(products, target)
    _assert_the_model_finds_a_step_of_every_product(builds, target)
    if target in ("sm_80", "sm_90"):
        _assert_resident_blocks(products, target)


def _assert_kinds_of_instructions(built: Built) -> None:
    (kernel, dtype, sizes), code, name = built.kernel, built.text, f"{built.kernel} {built.arch}"
    assert not re.search(r"\b(STL|LDL)\b", code), f"{name} spills"
    if kernel in PRODUCTS:
        assert bool(re.search(r"\bHMMA\b", code)) == (dtype != "fp32"), f"{name}: tensor cores"
        assert bool(re.search(r"\bLDSM\b", code)) == (dtype != "fp32"), f"{name}: ldmatrix"
    if kernel in (*PRODUCTS, *OF_FEW_TOKENS):
        assert re.search(r"LDGSTS\S*\.128", code), f"{name}: 16-byte asynchronous copies"
    if kernel in WRITERS:  # four lanes write a sector of 32 bytes together
        assert re.search(r"STG\S*\.64", code), f"{name}: 8-byte stores"
    if kernel == "dropout" and sizes == (1,):
        loads, stores = (len(re.findall(rf"\b{access}\S*\.128", code)) for access in ("LDG", "STG"))
        assert loads == stores == (4 if dtype == "fp32" else 2), f"{name}: 16-byte accesses to the 16 elements of a lane"
    if kernel in OF_FEW_TOKENS:  # a vector of weights and of x in each of four steps
        assert re.search(r"LDG\S*\.128", code), f"{name}: 16-byte loads of the weights"
        loops = [part for part in re.split(r"\.L_x_\d+:|\bBRA\b", code) if len(_vector_loads(part)) >= 8]
        together = [len(_vector_loads(re.split(r"\bFFMA\b", loop)[0])) for loop in loops]
        assert len(together) == 6, f"{name}: not a loop for each number of tokens and dtype of the weights"
        assert min(together) >= 8, f"{name}: only {together} 16-byte loads on the way together"


def _assert_few_instructions_in_a_step(products: list[Built], target: str) -> None:
    """Addresses are made before the loop: made in it, they took three quarters of its instructions."""
    for one in products:
        columns = next(iter(one.kernel.sizes), 128)
        of_64, of_more, of_features = MOST_INSTRUCTIONS[target]
        loops = [(columns // 2, 4 + -(-columns // 32), of_64 if columns == 64 else of_more)]
        over_features = (64, 4, of_features)  # the loop copies one operand
        if one.kernel.name == "forward":
            loops.append(over_features)
        if one.kernel.name == "expand_walk":
            loops = [over_features]
        for count, copies, most in loops:  # products of a warp; copies of a thread
            step = find_step(one.listing, count, copies)
            share = len(step.indices) / step.count(r"HMMA\b")
            assert share <= most, f"{one.kernel} {target}: {share:.2f} instructions for each of the tensor cores"


def _assert_the_model_finds_a_step_of_every_product(builds: list[Built], target: str) -> None:
    """`python -m benchmarks.model` reads them, and would stop at a loop that has other products or copies than its tile."""
    found = steps.lines(Machine(target, {one.kernel: one for one in builds if one.kernel.dtype == "bf16"}))
    assert {(line.kernel.partition("[")[0], line.step is not None) for line in found} == {
        (kernel, kernel in PRODUCTS) for kernel in KERNELS
    }
    assert not [one.kernel for one in builds if steps.resident(one) < 1]


def _assert_resident_blocks(products: list[Built], target: str) -> None:
    """As many as the plans rely on, with E = 8 and R = 16, by registers, threads and shared memory."""
    counts = (128, 136)  # coefficients of y and of dx, which lie in shared memory in expand_walk
    found = {(str(one.kernel), count): steps.resident(one, count) for one in products for count in counts}
    expected = {
        (str(one.kernel), count): 1 if one.kernel.name == "forward" else configs.RESIDENT_BLOCKS
        for one in products
        for count in counts
    }
    if target == "sm_80":
        expected |= {(f"expand_walk_kernel<{dtype}>", 136): 1 for dtype in ("bf16", "fp16")}
    assert len(expected) == 2 * 2 * (3 * len(WIDTHS) + 2)
    assert found == expected
