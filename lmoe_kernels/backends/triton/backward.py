# SPDX-License-Identifier: Apache-2.0
"""Backward of the `triton` backend: which kernels run, in which order.

    _shrink_mix_bwd_kernel    dy, B, u -> dv -> du, dlogits, v      or split-K over O: _shrink_fwd_kernel, _mix_bwd_kernel
    _wgrad_bwd_kernel         v, dy -> dB;  [du | dlogits], x -> dA, dgate_weight
    _reduce_bwd_kernel        adds up the partial sums of a weight gradient that is split over the tokens
    _expand_fwd_kernel        [du | dlogits], [A | gate_weight] -> dx

    grouped                   where the forward is, by its route: _grouped_shrink_fwd_kernel, _grouped_mix_bwd_kernel,
                              _grouped_wgrad_bwd_kernel, _expand_fwd_kernel (gate alone), _grouped_expand_fwd_kernel

The gradient of gate_bias is a sum of dlogits over the tokens, left to ATen.

Two kernels read dy, one right after the other, so that the second finds in the L2 what fits there: all of dy up to some 4000
tokens of O = 4096 in bf16 (an H200 has 60 MB). x is read once. dx comes last, because the frozen product adds into it.

Reading dy once would save 2 O = 8192 bytes a token where dy exceeds the L2. By counting bytes, no scheme saves more than it
costs (E R = 128, 132 processors; none of them was timed):
- One kernel makes both products of a slab of F features. It leaves dv as O / F partial sums, which cost 8 E R O / F bytes a
  token: 32768 at F = 128. F = 512 breaks even, but then the accumulators of dB fill all registers. For E R <= 32 only.
- One kernel goes over a tile of tokens twice. It needs 132 tiles of 64 tokens in the L2, 66 MB, and adds each of them to a
  dB of 2 MB in fp32: 65536 bytes a token.
- Shrink and wgrad alternate over chunks of tokens. 2048 tokens, 16 MB, stay in the L2 and make 32 tiles. To fill the chip
  the shrink then splits O by four, 4096 bytes a token, and the wgrad splits the tokens, into sums that each chunk reads and
  writes, 8192. That traffic is the L2's, but each chunk costs three more launches, to save the memory 4 us (at 4.3 TB/s).
"""

from torch import Tensor

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.expand import expand_fwd, grouped_expand_fwd
from lmoe_kernels.backends.triton.fused import shrink_mix_bwd
from lmoe_kernels.backends.triton.mix import (
    MixTensors,
    gate_constants,
    grouped_mix_bwd,
    grouped_mix_fwd,
    mix_bwd,
    mix_fwd,
)
from lmoe_kernels.backends.triton.plans import BackwardPlan, Chip, GroupedPlan
from lmoe_kernels.backends.triton.shrink import grouped_shrink_fwd, shrink_fwd
from lmoe_kernels.backends.triton.wgrad import grouped_wgrad_bwd, wgrad_bwd
from lmoe_kernels.casting import from_buffer
from lmoe_kernels.options import Factors, Gradients, Options, Saved, Sizes, Wanted


def backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E)
    x: Tensor | None,  # (T, I)
    factors: Factors,
    saved: Saved,
    options: Options,
    *,
    wanted: Wanted,
) -> Gradients:
    """The gradients that are wanted; see `lmoe_kernels.reference.backward` for the contract."""
    sizes, chip = factors.sizes(dy.shape[0]), host.chip_of(dy.device)
    plan = configs.backward_plan(sizes, dy.dtype, chip)
    groups = configs.grouped_plan(sizes, options, dy.dtype, chip)
    cast = from_buffer(factors, dy.dtype, saved.cast)
    logits = saved.router_logits(factors)
    columns = sizes.E if groups is None else options.kept(sizes.E)  # of v and dv for each token
    columns_of_u = sizes.experts_of_a if groups is None else columns
    tensors = MixTensors(
        logits,
        dlogits_in,
        saved.u,
        du=dy.new_empty(sizes.T, columns_of_u, sizes.R) if wanted.x or wanted.lora_a else None,
        dlogits=dy.new_empty(sizes.T, sizes.E, dtype=logits.dtype if factors.gate_weight is None else dy.dtype),
        v=dy.new_empty(sizes.T, columns, sizes.R) if wanted.lora_b else None,
    )
    with host.on_device_of(dy):
        if groups is None:
            grads = _all_experts(dy, x, factors, cast, tensors, options, plan, sizes, chip, wanted)
        else:
            grads = _grouped(dy, x, factors, cast, tensors, saved.route, options, plan, groups, chip, wanted)
    if wanted.gate_bias:
        assert factors.gate_bias is not None
        summed = tensors.dlogits.sum(0, dtype=host.accumulator(dy))
        grads = grads._replace(gate_bias=summed.to(factors.gate_bias.dtype))
    return grads._replace(gate_logits=tensors.dlogits) if wanted.gate_logits else grads


def _all_experts(
    dy: Tensor,  # (T, O)
    x: Tensor | None,  # (T, I)
    factors: Factors,
    cast: Factors,  # in dy's dtype
    tensors: MixTensors,
    options: Options,
    plan: BackwardPlan,
    sizes: Sizes,
    chip: Chip,
    wanted: Wanted,
) -> Gradients:
    """Writes du, dlogits and v of all experts for every token; returns the gradients of x, A, B and gate_weight.

    dv lies in the memory of dx where that has room for it, since dx is written last.
    """
    lora_a, lora_b, gate_weight, _, _ = factors
    T, I, _, E, R, _ = sizes  # noqa: E741
    constants, du, v = gate_constants(sizes, options), tensors.du, tensors.v
    dlora_a = dlora_b = dgate_weight = None
    dx = dy.new_empty(T, I) if wanted.x else None
    if du is not None or wanted.gate:
        dv = dx if dx is not None and I >= E * R else dy.new_empty(T, E, R)
        if plan.splits == 1:
            shrink_mix_bwd(dy, cast.lora_b, dv, tensors, options.scaling, constants, plan.shrink)
        else:
            dv_parts, _ = shrink_fwd(dy, cast.lora_b, None, plan.splits, plan.shrink)
            mix_bwd(dv_parts, dv, tensors, options.scaling, constants, plan.mix)
    elif v is not None:
        mix_fwd(tensors.u, v, constants, plan.mix, gate_logits=tensors.logits)
    if v is not None:
        (dlora_b,) = wgrad_bwd(dy, [(v, lora_b)], chip, scaling=options.scaling)
    pairs = [(du, lora_a)] if wanted.lora_a and du is not None else []
    pairs += [(tensors.dlogits, gate_weight)] if wanted.gate_weight and gate_weight is not None else []
    if pairs:
        assert x is not None
        grads = wgrad_bwd(x, pairs, chip)
        dlora_a = grads[0] if wanted.lora_a else None
        dgate_weight = grads[-1] if wanted.gate_weight else None
    if dx is not None:
        assert du is not None
        dlogits = None if gate_weight is None else tensors.dlogits
        expand_fwd(du, cast.lora_a, dx, plan.expand, dlogits=dlogits, gate_weight=cast.gate_weight)
    return Gradients(dx, dlora_a, dlora_b, dgate_weight)


def _grouped(
    dy: Tensor,  # (T, O)
    x: Tensor | None,  # (T, I)
    factors: Factors,
    cast: Factors,  # in dy's dtype
    tensors: MixTensors,
    route: Tensor | None,  # (K, 2 T + E + 1)
    options: Options,
    plan: BackwardPlan,
    groups: GroupedPlan,
    chip: Chip,
    wanted: Wanted,
) -> Gradients:
    """The same by the tokens of each expert."""
    lora_a, lora_b, gate_weight, _, _ = factors
    sizes, du, v = factors.sizes(dy.shape[0]), tensors.du, tensors.v
    constants = gate_constants(sizes, options)
    dx = dlora_a = dlora_b = dgate_weight = None
    if route is None:
        raise ValueError("lmoe: route must be the tensor that the forward returned, got None")
    if du is not None or wanted.gate:
        dv = dy.new_empty(sizes.T, options.kept(sizes.E), sizes.R)
        grouped_shrink_fwd(dy, cast.lora_b, route, dv, groups.shrink, by_expert=False, scaling=options.scaling)
        grouped_mix_bwd(dv, tensors, route, constants, plan.mix)
    elif v is not None:
        grouped_mix_fwd(tensors.u, route, v, constants, plan.mix, logits=tensors.logits)
    if v is not None:
        dlora_b = grouped_wgrad_bwd(dy, v, lora_b, route, groups.wgrad, scaling=options.scaling)
    if wanted.lora_a:
        assert x is not None
        assert du is not None
        dlora_a = grouped_wgrad_bwd(x, du, lora_a, route, groups.wgrad)
    if wanted.gate_weight:
        assert x is not None
        assert gate_weight is not None
        (dgate_weight,) = wgrad_bwd(x, [(tensors.dlogits, gate_weight)], chip)
    if wanted.x:
        assert du is not None
        dx = dy.new_empty(sizes.T, sizes.I)
        if cast.gate_weight is not None:
            expand_fwd(tensors.dlogits, cast.gate_weight[:, None], dx, groups.gate_expand)
        grouped_expand_fwd(du, cast.lora_a, route, dx, groups.expand, base=None if gate_weight is None else dx)
    return Gradients(dx, dlora_a, dlora_b, dgate_weight)
