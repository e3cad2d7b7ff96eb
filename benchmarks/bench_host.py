"""Host cost of one call on the cuda backend: Python and C++, from `lmoe` to the launch, which is stubbed.

    python -m benchmarks.bench_host

Runs anywhere with g++: bindings and launchers are compiled for the emulator of the tests, whose launch is told to return
at once. What is left stands between the caller and the driver, on CPU tensors: allocation costs what it costs there; asking
torch for the current stream (some 0.1 us) is left out. CPU time is counted, the least of several rounds beside their median:
what a busy machine adds shows there. Nothing is said about a GPU.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lmoe_kernels import dispatch, lmoe
from lmoe_kernels.backends.cuda import extension
from tools.emulator.build import build_extension

PROCESSORS = 132
CALLS, ROUNDS = 1000, 40


def stub_launches(cache: Path) -> None:
    """Put bindings and launchers that launch nothing behind the cuda backend, for this process."""
    library = build_extension(cache, seed=1)
    ctypes.CDLL(str(library.__file__)).emu_launch_nothing(PROCESSORS)
    extension.library = lambda: library
    extension.queue = lambda tensor: (0, 0)
    extension.processors = lambda index: PROCESSORS
    dispatch.BACKENDS["cuda"] = replace(dispatch.BACKENDS["cuda"], why_not=lambda problem: None)


def microseconds(call: Callable[[], object]) -> str:
    """The mean time of a call: the least of some rounds, and their median."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        times.append((time.process_time() - start) / CALLS * 1e6)
    return f"{min(times):5.1f} ({statistics.median(times):5.1f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/cuda_emu"), help="where the compiled launchers are kept")
    stub_launches(parser.parse_args().cache.resolve())
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, E=8 R=16 I=O=64, bf16, microseconds a call: least (median) of the rounds")
    for tokens in (1, 16, 512):
        x = torch.randn(tokens, 64).bfloat16()
        a, b = (torch.randn(8, 16, 64).bfloat16() for _ in range(2))
        gate = torch.randn(8, 64).bfloat16()
        with torch.no_grad():
            forward = microseconds(lambda x=x, a=a, b=b, g=gate: lmoe(x, a, b, gate_weight=g, backend="cuda"))
            direct = microseconds(
                lambda x=x, a=a, b=b, g=gate: dispatch.load("cuda").forward(
                    x, a, b, g, None, None, 1.0, "factors", None, True, False
                )
            )
        for parameter in (a, b, gate):
            parameter.requires_grad_()
        training = microseconds(lambda x=x, a=a, b=b, g=gate: lmoe(x, a, b, gate_weight=g, backend="cuda"))
        print(f"T={tokens:<5} gradients off {forward}, of it the backend {direct}; gradients on {training}")


if __name__ == "__main__":
    main()
