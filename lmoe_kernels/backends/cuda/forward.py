# SPDX-License-Identifier: Apache-2.0
"""Forward of the `cuda` backend: chooses a path, allocates its workspaces, fills in the parameters and launches.

Every tensor whose address is passed stays referenced until the launcher returns; the caching allocator then keeps its memory
in the order of the stream.
"""

import torch
from torch import Tensor

from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.configs import decode_plan, expand_groups, one_pass_smem, padded, shrink_parts
from lmoe_kernels.casting import CastFactors, cast_factors
from lmoe_kernels.options import Factors, Options, Saved


def forward(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """The delta, added to `base`; see `lmoe_kernels.reference.forward` for the contract."""
    sizes, has_gate = factors.sizes(x.shape[0]), factors.gate_logits is None
    T, I, O, E, R, experts_of_a = sizes  # noqa: E741
    library = extension.library()
    device, stream = extension.queue(x)
    element_size, chip = x.element_size(), extension.device_of(device)
    plan = decode_plan(T, I, O, E, experts_of_a, R, has_gate, element_size, chip)
    columns = experts_of_a * R + (E if has_gate else 0)
    smem = 0 if plan is not None else one_pass_smem(T, E, R, columns, element_size, chip.processors)
    smem = smem if smem <= chip.shared_memory_a_block else 0
    staged = plan is None and smem == 0
    # decode reads every factor once, and alone can read fp32 as fast as 16 bits
    factors, cast = CastFactors(factors, None) if plan is not None and not save else cast_factors(factors, x.dtype)
    y = x.new_empty(T, O)
    u = logits = None
    if save or staged:
        u = x.new_empty(T, experts_of_a, R)
        logits = x.new_empty(T, E, dtype=torch.float32) if has_gate else None

    params = (library.ForwardParams if plan is None else library.DecodeParams)(extension.DTYPES[x.dtype], sizes)
    params.set_problem(options, factors, x, base, logits, u, y)
    if plan is not None:
        totals = x.new_empty(T, columns, dtype=torch.float32)
        params.set_plan(totals, *plan)
        library.decode(params, device, stream)
    elif staged:
        parts = shrink_parts(T, columns, I, element_size, chip.processors)
        v = x.new_empty(T, padded(E * R))
        partial = x.new_empty(parts, T, columns, dtype=torch.float32)
        params.set_workspaces(v, partial, parts, expand_groups(T, O, chip.processors))
        library.forward(params, device, stream)
    else:
        params.set_one_pass(smem)
        library.forward(params, device, stream)
    return y, Saved(logits, u, cast=cast) if save and u is not None else None
