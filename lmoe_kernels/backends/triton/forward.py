# SPDX-License-Identifier: Apache-2.0
"""Forward of the `triton` backend: which kernels run, in which order.

plan           kernels                                                     possible where
one pass       _one_pass_fwd_kernel                                        E * R fits one tile
two kernels    _shrink_mix_fwd_kernel, _expand_fwd_kernel                  always, but for long fp32 sums
three kernels  _shrink_fwd_kernel, _mix_fwd_kernel, _expand_fwd_kernel     always: split-K over I
grouped        _shrink_fwd_kernel (gate alone), _route_fwd_kernel,         top_k is small against E
               _group_fwd_kernel, _grouped_shrink_fwd_kernel, _grouped_mix_fwd_kernel,
               _grouped_expand_fwd_kernel for each slot

Of the first three the one is taken that `cost.py` models as fastest: three kernels for few tokens, and up to some 8000 on an
H100, which they fill with tiles of 128 tokens; one pass for more (E R = 128, 4096 features).
"""

from torch import Tensor

from lmoe_kernels.backends.triton import configs, host
from lmoe_kernels.backends.triton.expand import expand_fwd, grouped_expand_fwd
from lmoe_kernels.backends.triton.fused import one_pass_fwd, shrink_mix_fwd
from lmoe_kernels.backends.triton.mix import gate_constants, grouped_mix_fwd, mix_fwd
from lmoe_kernels.backends.triton.plans import ForwardPlan, GroupedPlan
from lmoe_kernels.backends.triton.route import route_fwd
from lmoe_kernels.backends.triton.shrink import grouped_shrink_fwd, shrink_fwd
from lmoe_kernels.casting import cast_factors
from lmoe_kernels.options import Factors, Options, Saved, Sizes


def forward(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """The delta, added to `base`; see `lmoe_kernels.reference.forward` for the contract."""
    sizes, chip = factors.sizes(x.shape[0]), host.chip_of(x.device)
    plan = configs.forward_plan(sizes, x.dtype, chip)
    groups = configs.grouped_plan(sizes, options, x.dtype, chip)
    factors, cast = cast_factors(factors, x.dtype)
    y, logits = x.new_empty(sizes.T, sizes.O), None
    if save and factors.gate_weight is not None:
        logits = x.new_empty(sizes.T, sizes.E, dtype=host.accumulator(x))
    with host.on_device_of(x):
        if groups is None:
            u, route = _all_experts(x, factors, base, options, logits, y, plan, sizes, save=save), None
        else:
            u, route = _grouped(x, factors, base, options, logits, y, plan, groups)
    return y, Saved(logits, u, route, cast) if save and u is not None else None


def _all_experts(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    logits: Tensor | None,  # (T, E), written
    y: Tensor,  # (T, O), written
    plan: ForwardPlan,
    sizes: Sizes,
    *,
    save: bool,
) -> Tensor | None:
    """y by all experts for every token; returns u (T, E, R) or (T, 1, R), or None unless `save`.

    Memory that is not saved is not allocated where y has room for it until it is written itself.
    """
    T, _, O, E, R, experts_of_a = sizes  # noqa: E741
    constants = gate_constants(sizes, options)
    if plan.one_pass is not None:
        fits = O >= 2 * E * R
        u = x.new_empty(T, E, R) if save or not fits else None
        v = None if fits else x.new_empty(T, E, R)
        one_pass_fwd(x, factors, base, logits, u, v, y, options.scaling, constants, plan.one_pass)
        return u
    u = x.new_empty(T, experts_of_a, R) if save or experts_of_a * R > O else y
    v = x.new_empty(T, E, R)
    if plan.splits == 1:
        shrink_mix_fwd(x, factors, logits, u, v, constants, plan.shrink)
    else:
        u_parts, logit_parts = shrink_fwd(x, factors.lora_a, factors.gate_weight, plan.splits, plan.shrink)
        mix_fwd(
            u, v, constants, plan.mix,
            u_parts=u_parts, logit_parts=logit_parts, gate_bias=factors.gate_bias, gate_logits=factors.gate_logits,
            logits=logits,
        )  # fmt: skip
    expand_fwd(v, factors.lora_b, y, plan.expand, base=base, scaling=options.scaling)
    return u


def _grouped(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    logits: Tensor | None,  # (T, E), written
    y: Tensor,  # (T, O), written
    plan: ForwardPlan,
    groups: GroupedPlan,
) -> tuple[Tensor, Tensor]:
    """y by the tokens of each expert; returns u (T, E, R), unwritten for experts that a token does not keep, and the route.

    `u` has all E experts because what torch.compile traces must not depend on the plan. It is not filled with zeros, which
    would cost 2 E R bytes a token (4096 at E = 128 and R = 16, a twelfth of all the traffic at I = O = 4096 and k = 2): the
    backward reads only the experts that are kept.
    """
    sizes, logit_parts = factors.sizes(x.shape[0]), None
    if factors.gate_weight is not None:
        logit_parts, _ = shrink_fwd(x, factors.gate_weight[:, None], None, plan.splits, groups.gate)
    gates, route = route_fwd(
        x, sizes, options, groups.route,
        logit_parts=logit_parts, gate_bias=factors.gate_bias, gate_logits=factors.gate_logits, logits=logits,
    )  # fmt: skip
    u = x.new_empty(sizes.T, sizes.E, sizes.R)
    v = x.new_empty(sizes.T, options.kept(sizes.E), sizes.R)
    grouped_shrink_fwd(x, factors.lora_a, route, u, groups.shrink, by_expert=True)
    grouped_mix_fwd(u, route, v, gate_constants(sizes, options), plan.mix, gates=gates)
    grouped_expand_fwd(v, factors.lora_b, route, y, groups.expand, base=base, scaling=options.scaling)
    return u, route
