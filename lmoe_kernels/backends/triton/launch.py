"""The host's side that forward and backward share: the chip, a launch, and the constants that every kernel takes."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmoe_kernels.backends.triton.configs import Chip, Sizes, Tile
from lmoe_kernels.backends.triton.tiles import APART, BLEND, SHARED


def sizes_of(rows: Tensor, lora_a: Tensor, lora_b: Tensor) -> Sizes:
    """The letters of a call; `rows` are x or dy."""
    experts, rank, out_features = lora_b.shape
    return Sizes(rows.shape[0], lora_a.shape[2], out_features, experts, lora_a.shape[0], rank)


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
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: object, tile: Tile, **constants: object) -> None:
    """Start a kernel with those blocks of the tile that it names; an empty grid starts nothing."""
    if 0 in grid:
        return
    kernel[grid](*args, **constants, **launch_options(kernel, tile))


@cache
def launch_options(kernel: triton.JITFunction, tile: Tile) -> dict[str, int]:
    """The blocks of the tile that a kernel names, and how it is launched."""
    blocks = {name: size for name, size in tile.blocks().items() if name in kernel.arg_names}
    return blocks | {"num_warps": tile.warps, "num_stages": tile.stages}


def accumulator(rows: Tensor) -> torch.dtype:
    """What sums are held in: fp32, or fp64 for fp64."""
    return torch.promote_types(rows.dtype, torch.float32)


def dot_constants(rows: Tensor) -> dict[str, object]:
    """How dots accumulate.

    fp32 operands are rounded to tf32 only where the user's flags let PyTorch's products do so, and where the chip has it:
    of AMD's gfx942 alone has, and elsewhere Triton refuses to compile.
    """
    tf32 = rows.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if tf32 and (arch := chip_of(rows.device).arch).startswith("gfx"):
        tf32 = arch == "gfx942"
    acc = tl.float64 if rows.dtype == torch.float64 else tl.float32
    return {"ACC": acc, "PRECISION": "tf32" if tf32 else "ieee"}


def mix_constants(sizes: Sizes, mixing: str, top_k: int | None, renormalize: bool) -> dict[str, int]:
    """How the experts of a token meet their gates."""
    kept = min(top_k or sizes.E, sizes.E)
    sums_to_one, mix = renormalize or kept == sizes.E, BLEND if mixing == "factors" else APART
    if sizes.E_of_a < sizes.E and (sums_to_one or mix == APART):
        mix = SHARED
    return {
        "E": sizes.E, "E_OF_A": sizes.E_of_a, "R": sizes.R, "MIX": mix.value, "TOP_K": kept, "RENORMALIZE": sums_to_one,
    }  # fmt: skip


def row_stride(base: Tensor | None) -> int:
    """Elements from one token's row to the next; none for a bias, which is every token's."""
    return 0 if base is None or base.dim() == 1 else base.stride(0)
