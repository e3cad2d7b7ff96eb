"""Triton believes in a GPU that is not there: kernels compile and are launched, and a launch returns at once.

Triton's own code runs, from the call of a kernel to the driver's `cuLaunchKernelEx`; the driver is a stub, a small library
compiled here, whose functions succeed and compute nothing. Tensors are on the CPU, and what kernels would write stays as it
was. The host's cost of a call can be measured in this way, and which kernels a call compiles.

    with stubbed_gpu() as gpu:
        lmoe(x, lora_a, lora_b, gate_weight=gate_weight, backend="triton")
        print(gpu.launches())

It works with Triton 3.6 and 3.7, in a process that interprets no kernels and has not used a GPU, and needs a C compiler.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from lmoe_kernels import dispatch
from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.plans import Chip

COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
H100 = Chip("sm_90", 132, 227 << 10)

# The functions of the driver that Triton calls. The numbers are those of CUDA's enums, handles are anything but null.
_SOURCE = """
static int processors, shared_memory;
static long launches, early_launches;
static char handle;
void stub_chip(int p, int s) { processors = p; shared_memory = s; }
long stub_launches(void) { return launches; }
long stub_early_launches(void) { return early_launches; }
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "an error of the stub"; return 0; }
int cuDeviceGet(int *device, int i) { *device = i; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 97 ? shared_memory : attribute == 16 ? processors : attribute == 10 ? 32 : 65536;
  return 0;
}
int cuCtxGetCurrent(void **context) { *context = &handle; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(unsigned long *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, unsigned long value) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &handle; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = &handle; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &handle; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  return 0;
}
struct attribute { int id; char padding[4]; union { int on; char padding[64]; } value; };
struct config { unsigned sizes[7]; void *stream; struct attribute *attributes; unsigned count; };
int cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
  launches++;
  for (unsigned i = 0; i < config->count; i++)  /* 6: programmatic stream serialization */
    early_launches += config->attributes[i].id == 6 && config->attributes[i].value.on == 1;
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
"""
_FOLDER = tempfile.TemporaryDirectory(prefix="stubbed_gpu_")
# Triton keeps what it has compiled under the device's number, so each stub has another one.
_numbers = count(64)


class StubbedGpu(CudaDriver):
    """Triton's driver for a chip that is not there."""

    def __init__(self, chip: Chip) -> None:
        self._library = _library()
        self._library.stub_chip(chip.processors, chip.shared_memory)
        super().__init__()
        number, capability = next(_numbers), int(chip.arch.removeprefix("sm_"))
        self.get_current_device = lambda: number
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=None: divmod(capability, 10)
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The chip for which kernels are compiled."""
        return self._target

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    def launches(self) -> int:
        """How many launches have reached the driver in this process."""
        return self._library.stub_launches()

    def early_launches(self) -> int:
        """How many of them let the kernel start before the previous one has ended."""
        return self._library.stub_early_launches()


@contextmanager
def stubbed_gpu(chip: Chip = H100, *, compiles: bool = True) -> Iterator[StubbedGpu]:
    """Let the `triton` backend take CPU tensors, and plan, compile and launch for a chip that is not there.

    Args:
        chip: the chip; by default that of an H100 or H200.
        compiles: False compiles nothing: every kernel is replaced by an object that can be launched. Nothing then reaches
            the driver.
    """
    driver = StubbedGpu(chip)
    row = dispatch.BACKENDS["triton"]._replace(why_not=lambda problem: None)

    def chip_of(device: torch.device) -> Chip:
        return chip

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        patches.enter_context(mock.patch.object(host, "chip_of", chip_of))
        patches.enter_context(mock.patch.dict(dispatch.BACKENDS, triton=row))
        folders = os.pathsep.join([_FOLDER.name, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        patches.enter_context(mock.patch.dict(os.environ, LD_LIBRARY_PATH=folders))  # processes started here find it too
        if not compiles:
            patches.enter_context(mock.patch.object(triton.compiler, "compile", _Uncompiled))
        yield driver


class _Uncompiled:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take a kernel's source and options, and compile nothing."""

    def run(self, *args: Any) -> None:
        """Launch nothing."""

    def launch_metadata(self, *args: Any) -> None:
        """Hooks are given nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run


@cache
def _library() -> ctypes.CDLL:
    """The stub of libcuda, loaded under the driver's name, so that Triton's modules find it."""
    if COMPILER is None:
        raise RuntimeError("stubbed_gpu: a C compiler must be installed, got none")
    torch.cuda.device_count()  # PyTorch must have asked the real driver before it can find this one
    path, source = Path(_FOLDER.name, "libcuda.so.1"), Path(_FOLDER.name, "stub.c")
    source.write_text(_SOURCE)
    subprocess.run([COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, source], check=True)
    knobs.nvidia.libcuda_path = _FOLDER.name  # where Triton's own modules are linked with it
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    library.stub_launches.restype = library.stub_early_launches.restype = ctypes.c_long
    return library
