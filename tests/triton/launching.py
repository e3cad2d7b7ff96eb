"""Launches that are compared with Triton's own choice of machine code; run in a process of their own, where Triton compiles.

A kernel is replaced by an object as soon as Triton would compile it. So each object stands for the machine code of one
specialisation, and it writes down how it is launched. Which object Triton itself would launch, its `warmup` tells.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from lmoe_kernels.backends.triton import host
from lmoe_kernels.backends.triton.dropout import dropout
from lmoe_kernels.backends.triton.plans import Tile
from tests.problems import Case, make_problem
from tests.serving import ADAPTERS, MIXED, QKV, make_call
from tools import calls
from tools.stubbed_gpu import StubbedGpu, stubbed_gpu

launched: list[tuple["Code", tuple[int, ...], list[object]]] = []  # what, on which grid, with which arguments


class Code(CompiledKernel):
    """In the place of machine code."""

    function, packed_metadata = 1, ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Compile nothing."""

    def launch_metadata(self, *args: Any) -> None:
        """Hooks are given nothing."""

    @property
    def run(self) -> Callable[..., None]:
        """A launch, as the driver is asked for it."""

        def run(x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
            assert (stream, function, metadata) == (0, self.function, self.packed_metadata)
            launched.append((self, (x, y, z), [_address(arg) for arg in rest[3:]]))

        return run


def _address(arg: object) -> object:
    return arg.data_ptr() if isinstance(arg, Tensor) else arg


def _kernel(x_ptr, y_ptr, T, F, stride, scaling, E: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr):
    pass


def _other(x_ptr, y_ptr, T, F, stride, scaling, E: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr):
    pass


kernel, other = (triton.jit(function, do_not_specialize=["T"]) for function in (_kernel, _other))
TILE = Tile(T=16, F=32, ER=64)
POOL = torch.zeros(64, dtype=torch.bfloat16)


class Launch(NamedTuple):
    """A launch, by default of arguments that any other launch differs from in one respect."""

    kernel: Any = kernel
    x: Tensor | None = POOL
    y: Tensor | None = POOL
    T: int = 35
    F: int = 35
    stride: int = 35
    scaling: float | None = 0.5
    constants: dict[str, object] = {"E": 4, "ACC": tl.float32}  # noqa: RUF012
    tile: Tile = TILE
    device: int | None = None  # None: that of the stub
    grid: tuple[int, ...] = (2, 3)


LARGE = 1 << 31
LAUNCHES = {
    "the same": Launch(),
    "another kernel": Launch(other),
    "another dtype": Launch(x=POOL.float()),
    "the other's dtype": Launch(y=POOL.half()),
    "no tensor": Launch(x=None),
    "no other tensor": Launch(y=None),
    "an address that is not aligned": Launch(x=POOL[1:]),
    "an address of another tensor that is not aligned": Launch(y=POOL[4:]),
    "two addresses that are not aligned": Launch(x=POOL[4:], y=POOL[7:]),
    "an aligned address": Launch(x=POOL[8:]),
    "one": Launch(F=1),
    "a stride of one": Launch(stride=1),
    "a multiple of 16": Launch(F=48),
    "a stride that is a multiple of 16": Launch(stride=0),
    "an unspecialised one": Launch(T=1),
    "the largest of 32 bits": Launch(F=LARGE - 1),
    "more than 32 bits": Launch(F=LARGE + 1),
    "a multiple of 16 of more than 32 bits": Launch(stride=LARGE),
    "the smallest of 32 bits": Launch(F=-LARGE + 1),
    "less than 32 bits": Launch(F=-LARGE - 1),
    "more than 32 bits, unspecialised": Launch(T=LARGE),
    "more than 63 bits": Launch(F=1 << 63),
    "an integer instead of a float": Launch(scaling=3),
    "another float": Launch(scaling=1.0),
    "no float": Launch(scaling=None),
    "another constant": Launch(constants={"E": 5, "ACC": tl.float32}),
    "another accumulator": Launch(constants={"E": 4, "ACC": tl.float64}),
    "constants in another order": Launch(constants={"ACC": 4, "E": tl.float32}),
    "another block": Launch(tile=Tile(T=32, F=32, ER=64)),
    "more warps": Launch(tile=Tile(T=16, F=32, ER=64, warps=8)),
    "more stages": Launch(tile=Tile(T=16, F=32, ER=64, stages=3)),
    "another device": Launch(device=1),
    "another grid": Launch(grid=(1, 2, 3)),
}


@contextmanager
def compared(gpu: StubbedGpu) -> Iterator[None]:
    """Within the block each launch must be that of the code which Triton chooses, with the arguments that were given."""
    launch = host.launch

    def checked(kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile, **constants: object) -> None:
        launched.clear()
        launch(kernel, grid, *args, tile=tile, **constants)
        options = host.launch_options(kernel, tile)
        named = constants | options
        values = [*map(_address, args), *(named[name] for name in kernel.arg_names[len(args) :])]
        code = kernel.warmup(*args, grid=grid, **constants, **options)
        assert launched == [(code, (*grid, 1, 1)[:3], values)], (kernel.fn.__name__, grid, args, constants, tile)

    with mock.patch.object(host, "launch", checked), mock.patch.object(triton.compiler, "compile", Code):
        yield


def every_kind() -> list[str]:
    """The launches that reach Triton's own code, when each comes for the first time, and when it comes again."""
    seen: list[str] = []
    run = triton.JITFunction.run

    def counting(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup:
            seen.append(name)
        return run(self, *args, warmup=warmup, **kwargs)

    with stubbed_gpu() as gpu, compared(gpu), mock.patch.object(triton.JITFunction, "run", counting):
        first = gpu.get_current_device()
        for repeat in range(2):
            for name, call in LAUNCHES.items():  # noqa: B007 (`counting` uses the name)
                gpu.get_current_device = lambda device=call.device: first if device is None else device
                args = (call.x, call.y, call.T, call.F, call.stride, call.scaling)
                host.launch(call.kernel, call.grid, *args, tile=call.tile, **call.constants)
            seen.append(f"round {repeat} ends")
    return seen


def whole_calls(seed: int) -> int:
    """Forwards and backwards of random problems, each twice; returns how many launches there were."""
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    count = 0
    with stubbed_gpu() as gpu, compared(gpu):
        for _ in range(12):
            case = Case(
                T=chosen.choice([1, 16, 64, 513]), I=chosen.choice([8, 33, 256]), O=chosen.choice([16, 40, 2048]),
                E=chosen.choice([1, 4, 5]), R=chosen.choice([3, 8, 16]), top_k=chosen.choice([None, 1]),
                mixing=chosen.choice(["factors", "outputs"]), shared_a=chosen.random() < 0.3,
                gate_bias=chosen.random() < 0.5,
            )  # fmt: skip
            dtype = chosen.choice([torch.bfloat16, torch.float16, torch.float32, torch.float64])
            problem = make_problem(case, dtype)
            factors = calls.factors_of(problem.tensors)
            for shift in (0, 1, 8):  # rows with other strides, from other addresses
                x = torch.randn(case.T, case.I + shift).to(dtype)[:, shift:]
                dy = torch.randn(case.T, case.O + shift).to(dtype)[:, shift:]
                base = chosen.choice([None, torch.zeros(case.O, dtype=dtype), torch.zeros_like(dy)])
                calls.forward("triton", x, factors, case.options, base=base, save=False)
                _, saved = calls.forward_saved("triton", x, factors, case.options, base=base)
                calls.backward("triton", dy, x, factors, saved, case.options, dlogits=problem.dlogits)
                dropout(x, torch.zeros((), dtype=torch.int64), chosen.random())
                count += 1
        for groups in ("", "int", "with scale"):
            call = make_call(chosen.choice([QKV, MIXED, ADAPTERS]), dtype, chosen.choice([1, 70]), groups=groups)
            for before in (2, 16):  # y from other addresses
                call.run("triton", before)
                count += 1
    return count
