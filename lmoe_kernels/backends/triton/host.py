# SPDX-License-Identifier: Apache-2.0
"""Host code that all stages share: the chip, a launch, and the constants of a dot."""

import ctypes
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from lmoe_kernels.backends.triton.plans import Chip, Tile

_SAME_DEVICE = nullcontext()
_IEEE = {"ACC": tl.float32, "PRECISION": "ieee"}
_TF32 = {"ACC": tl.float32, "PRECISION": "tf32"}
_FP64 = {"ACC": tl.float64, "PRECISION": "ieee"}
# The versions whose rules for choosing machine code are known, and whose machine code has been read. For AMD, Triton also
# looks at the size of the memory that an argument lies in, so that launches there go Triton's own way.
_KEEPS_CODE = triton.__version__.startswith(("3.6.", "3.7.")) and torch.version.hip is None


class _Code(NamedTuple):
    """Machine code that is loaded on a device, and what its launches have in common."""

    run: Any
    function: Any
    metadata: object
    tail: tuple[object, ...]  # the values of the constexpr parameters, which follow the arguments


_codes: dict[tuple[object, ...], _Code] = {}


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip that the kernels of a device run on; for the CPU, Triton's interpreter."""
    if device.type == "cpu":
        return Chip("interpreter", processors=4, shared_memory=1 << 16)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Chip(properties.gcnArchName.split(":")[0], properties.multi_processor_count, 1 << 16)
    arch = f"sm_{properties.major}{properties.minor}"
    return Chip(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def on_device_of(rows: Tensor) -> AbstractContextManager:
    """Make the tensor's device the current one, since Triton launches on the current device."""
    if not rows.is_cuda or rows.get_device() == torch.cuda.current_device():
        return _SAME_DEVICE
    return torch.cuda.device(rows.device)


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, tile: Tile, **constants: object) -> None:
    """Launch a kernel with those blocks of the tile that it has a parameter for; an empty grid launches nothing.

    In each launch Triton finds out anew which machine code fits the arguments, which takes most of a launch: it takes 6 us
    instead of 17 (Intel Xeon, a stub of the driver, 2026-11) where the code is kept, under everything that Triton chooses it
    by. Its debug and instrumentation modes are those of the first launch.
    """
    if 0 in grid:
        return
    hooks = knobs.runtime
    if (
        not _KEEPS_CODE
        or type(kernel) is not triton.JITFunction  # but one for the interpreter
        or getattr(hooks.launch_enter_hook, "calls", True)  # a hook, such as a profiler's, must see each launch
        or getattr(hooks.launch_exit_hook, "calls", True)
    ):
        kernel[grid](*args, **constants, **launch_options(kernel, tile))
        return
    driver: Any = triton.runtime.driver.active
    device = driver.get_current_device()
    key: list[object] = [kernel.fn, device, tile.key, *constants, *constants.values()]
    values = _add_kinds(key, args)
    code = _codes.get(tuple(key))
    if code is None:
        options = launch_options(kernel, tile)
        compiled: Any = kernel[grid](*args, **constants, **options)
        if isinstance(compiled, CompiledKernel):
            named = constants | options
            tail = tuple(named[name] for name in kernel.arg_names[len(args) :])
            _codes[tuple(key)] = _Code(compiled.run, compiled.function, compiled.packed_metadata, tail)
        return
    run, function, metadata, tail = code
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    run(x, y, z, driver.get_current_stream(device), function, metadata, None, None, None, *values, *tail)


def _add_kinds(key: list[object], args: tuple[Any, ...]) -> list[object]:
    """Add to a key what Triton specialises machine code on; returns the arguments as the code takes them.

    That is whether an argument is None; a tensor's dtype, and whether its address is a multiple of 16; whether an integer is
    1, whether it is a multiple of 16, and whether it fits 32 bits.
    """
    values: list[object] = []
    for arg in args:
        kind = type(arg)
        if kind is int:
            fits = -(1 << 31) <= arg < 1 << 31
            key.append((1 if arg == 1 else 16 if arg % 16 == 0 else 0) if fits else ("large", arg))
            values.append(arg)
        elif arg is None or kind is float:
            key.append(kind)
            values.append(arg)
        else:
            address = arg.data_ptr()
            key.append(arg.dtype if address % 16 == 0 else (arg.dtype, "not aligned"))
            values.append(address)
    return values


def launch_options(kernel: triton.JITFunction, tile: Tile) -> dict[str, int]:
    """The tile's blocks among a kernel's parameters, its warps and pipeline stages, and whether it starts early."""
    driver: Any = triton.runtime.driver
    early = type(kernel) is triton.JITFunction and starts_early(driver.active.get_current_target())
    return _options(kernel, tile, early and _driver_version() >= 12030)


@cache
def _options(kernel: triton.JITFunction, tile: Tile, early: bool) -> dict[str, int]:
    blocks = {name: size for name, size in tile.blocks().items() if name in kernel.arg_names}
    options = blocks | {"num_warps": tile.warps, "num_stages": tile.stages}
    if "PDL" not in kernel.arg_names:  # it waits for no other kernel
        return options
    return options | ({"PDL": True, "launch_pdl": True} if early else {"PDL": False})


def starts_early(target: GPUTarget) -> bool:
    """Whether kernels start before the previous one in their stream has ended: programmatic dependent launch, from sm_90 on.

    The programs of a kernel then come onto the processors while those of the previous one end, which hides some of the time
    between two kernels. A launch with this attribute has another order with one kernel alone: the one right before it in the
    stream, whoever launched that. Until a kernel has waited for that one it may not touch memory: neither read its results,
    nor write where it still reads, since PyTorch gives freed memory to the next tensor of the stream at once. The wait is
    the first statement of every kernel, and all of its programs wait. Then

    - a kernel that has waited comes after all earlier ones, since the previous one has waited too before it ended;
    - a kernel lets the next one start after its own wait: what another library's kernel reads before it waits has been
      written, unless it is what this kernel writes;
    - a launch without the attribute, a copy or an event comes after the whole kernel before it, as ever, and a kernel behind
      a copy or behind a wait for another stream starts when that is over.

    All launches have the attribute, also those that no graph captures: a capture of kernels that have run before then finds
    them loaded. `benchmarks.inspect.static` reads in the machine code of every kernel that no access to global memory comes
    before the wait; of sm_100's tensor memory, a program takes its part before it, and lets the next kernel start later.

    On an H200 (4096 x 4096, E=8, R=16, bf16, CUDA graphs, 2026-11-26) a forward takes 8.6 us instead of 9.7 at one token and
    64.0 instead of 65.7 at 8192; a backward 15.1 instead of 17.0, and at 8192 tokens 138.2 instead of 134.6. No other chip
    has run launches with the attribute.
    """
    return _KEEPS_CODE and target.backend == "cuda" and int(target.arch) >= 90


@cache
def _driver_version() -> int:
    """The driver's version of CUDA: 12030 for 12.3, since when a graph can hold such launches; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:  # there is no driver, or it has another name
        return 0
    return version.value


def accumulator(rows: Tensor) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def dot_constants(rows: Tensor) -> Mapping[str, object]:
    """How a dot accumulates, and whether it rounds fp32 operands to tf32.

    It does so only where the user's flags allow it for PyTorch's own products and the chip supports it: of AMD's chips only
    gfx942 does, and Triton refuses to compile tf32 for the others.
    """
    dtype = rows.dtype
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if tf32 and (arch := chip_of(rows.device).arch).startswith("gfx"):
        tf32 = arch == "gfx942"
    return _FP64 if dtype == torch.float64 else _TF32 if tf32 else _IEEE


def row_stride(base: Tensor | None) -> int:
    """Elements from one token's row of `base` to the next; 0 for a bias, which all tokens share."""
    return 0 if base is None or base.dim() == 1 else base.stride(0)
