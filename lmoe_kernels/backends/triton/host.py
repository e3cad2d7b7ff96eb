# SPDX-License-Identifier: Apache-2.0
"""Host code that all stages share: the chip, a launch, and the constants of a dot."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton.configs import Chip, Tile


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
    return torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: object, tile: Tile, **constants: object) -> None:
    """Launch a kernel with those blocks of the tile that it has a parameter for; an empty grid launches nothing."""
    if 0 in grid:
        return
    kernel[grid](*args, **constants, **launch_options(kernel, tile))


@cache
def launch_options(kernel: triton.JITFunction, tile: Tile) -> dict[str, int]:
    """The tile's blocks among a kernel's parameters, its warps and its pipeline stages."""
    blocks = {name: size for name, size in tile.blocks().items() if name in kernel.arg_names}
    return blocks | {"num_warps": tile.warps, "num_stages": tile.stages}


def accumulator(rows: Tensor) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.promote_types(rows.dtype, torch.float32)


def dot_constants(rows: Tensor) -> dict[str, object]:
    """How a dot accumulates, and whether it rounds fp32 operands to tf32.

    It does so only where the user's flags allow it for PyTorch's own products and the chip supports it: of AMD's chips only
    gfx942 does, and Triton refuses to compile tf32 for the others.
    """
    tf32 = rows.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if tf32 and (arch := chip_of(rows.device).arch).startswith("gfx"):
        tf32 = arch == "gfx942"
    acc = tl.float64 if rows.dtype == torch.float64 else tl.float32
    return {"ACC": acc, "PRECISION": "tf32" if tf32 else "ieee"}


def row_stride(base: Tensor | None) -> int:
    """Elements from one token's row of `base` to the next; 0 for a bias, which all tokens share."""
    return 0 if base is None or base.dim() == 1 else base.stride(0)
