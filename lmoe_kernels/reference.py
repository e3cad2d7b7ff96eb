# SPDX-License-Identifier: Apache-2.0
"""The definition of L-MoE: a literal forward and an explicit backward, written for reading.

A frozen linear layer has E LoRA experts of rank R and a gate. For every token t:

    logits[t,e] = sum_i x[t,i] gate_weight[e,i] + gate_bias[e]     or those of an outside router
    gates[t]    = softmax(logits[t])                              over all experts
    gates[t]    = softmax(logits[t, kept])                        top_k: over the k largest; the others are 0
    gates[t]    = softmax(logits[t])[kept]                        top_k, renormalize=False; the others are 0
    gates[t]                                                      those of the caller, of any sign and sum, without a softmax
    A(t), B(t)  = sum_e gates[t,e] A_e,  sum_e gates[t,e] B_e      mixing="factors"
    delta[t]    = scaling * B(t) A(t) x[t]
    delta[t]    = scaling * sum_e gates[t,e] B_e A_e x[t]          mixing="outputs"

`forward` builds these matrices for every token, which is slow and takes much memory. `backward` computes the gradient of the
same function, equation by equation. Both have the signatures that every backend must have, and tests compare every backend
with them.

Under mixing="outputs" the gradient of a gate is `dL/dgates[t,e] = scaling * <dy[t], B_e A_e x[t]>`. Under mixing="factors"
each gate occurs twice, in B(t) and in A(t), so that its gradient has two terms, which contain all cross terms B_e A_f:

    dL/dgates[t,e] = scaling * ( <dy[t], B_e A(t) x[t]>  +  <dy[t], B(t) A_e x[t]> )

Euler's identity gives a check, because delta is homogeneous of degree two in the gates:
`sum_e gates[t,e] dL/dgates[t,e] = 2 <dy[t], delta[t]>`.

With renormalize=True and a single kept expert the gate is constantly 1, so the logits get no gradient. With
renormalize=False the logits of dropped experts have gradients too, because they occur in the denominator of the softmax:

    dL/dlogits[t,e] = softmax(logits[t])[e] * ([e kept] dL/dgates[t,e] - sum_{f kept} gates[t,f] dL/dgates[t,f])

Dropout replaces x by `dropout(x)` for A alone; the gate and the frozen layer see x. Its mask is a hash of a seed, the token
and the feature, so that it is the same in every backend and is never stored.

Letters: T tokens, I in_features, O out_features, E experts, R rank. Source: L-MoE, arXiv 2510.17898.
"""

import torch
from torch import Tensor

from lmoe_kernels.options import Block, Factors, Gradients, Options, Saved, StackedFactors, TokenGroups, Wanted, places_of


def gate_softmax(logits: Tensor, top_k: int | None = None, renormalize: bool = True) -> Tensor:
    """Compute the gates: a softmax of the logits, set to 0 for all but each token's `top_k` experts with the largest logits.

    Of experts with equal logits, the one with the lower index is kept.

    Args:
        logits: (T, E), any floating dtype.
        top_k: number of experts kept for each token, None for all.
        renormalize: True for a softmax over the kept experts, False for one over all experts.

    Returns:
        gates (T, E). Each row sums to 1; to less with renormalize=False and dropped experts.
    """
    kept = kept_experts(logits, top_k)
    return softmax_among(logits, kept, renormalize).where(kept, 0.0)


def kept_experts(logits: Tensor, top_k: int | None) -> Tensor:
    """The experts that each token keeps, as a bool tensor (T, E)."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is None or top_k >= logits.shape[-1]:
        return kept
    dropped = logits.argsort(dim=-1, descending=True, stable=True)[..., top_k:]
    return kept.scatter(-1, dropped, False)


def softmax_among(logits: Tensor, kept: Tensor, renormalize: bool) -> Tensor:
    """The softmax (T, E) over the kept experts, or over all experts with renormalize=False."""
    return logits.where(kept, float("-inf")).softmax(dim=-1) if renormalize else logits.softmax(dim=-1)


def forward(
    x: Tensor,  # (T, I)
    factors: Factors,
    base: Tensor | None,  # (O) or (T, O), the delta is added to it
    options: Options,
    *,
    save: bool,
) -> tuple[Tensor, Saved | None]:
    """Compute base plus delta, with the matrices of every token.

    Semantics:
        A, B = einsum("te,eri->tri", gates, lora_a), einsum("te,ero->tro", gates, lora_b)
        y = base + scaling * einsum("tro,tri,ti->to", B, A, x)                                # mixing="factors"
        y = base + scaling * einsum("te,ero,eri,ti->to", gates, lora_b, lora_a, x)            # mixing="outputs"

    Returns:
        y (T, O) in x's dtype, and with `save` the tensors that `backward` needs, else None.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    xw, a, b = x.to(wide), factors.lora_a.to(wide), factors.lora_b.to(wide)

    if factors.gate_weight is not None:
        logits = torch.einsum("ti,ei->te", xw, factors.gate_weight.to(wide))
        if factors.gate_bias is not None:
            logits = logits + factors.gate_bias.to(wide)
    else:
        assert factors.gate_logits is not None
        logits = factors.gate_logits.to(wide)
    gates = gate_softmax(logits, options.top_k, options.renormalize) if options.softmax else logits

    a_of_expert = a.expand(b.shape[0], -1, -1)
    if options.averages_factors:
        a_of_token = torch.einsum("te,eri->tri", gates, a_of_expert)
        b_of_token = torch.einsum("te,ero->tro", gates, b)
        delta = torch.einsum("tro,tri,ti->to", b_of_token, a_of_token, xw)
    else:
        product_of_expert = torch.einsum("ero,eri->eoi", b, a_of_expert)
        product_of_token = torch.einsum("te,eoi->toi", gates, product_of_expert)
        delta = torch.einsum("toi,ti->to", product_of_token, xw)

    y = options.scaling * delta if base is None else base.to(wide) + options.scaling * delta
    if not save:
        return y.to(x.dtype), None
    u = torch.einsum("ti,eri->ter", xw, a)
    return y.to(x.dtype), Saved(logits if factors.gate_weight is not None else None, u.to(x.dtype))


def add_stacked(
    y: Tensor,  # (T, N), changed in place; rows may lie apart
    x: Tensor,  # (T, I)
    factors: StackedFactors,
    blocks: tuple[Block, ...],
    groups: TokenGroups | None,
) -> None:
    """Add the delta of every block to its columns of y, with the matrices of every token.

    Semantics:
        for block in blocks:
            delta = lmoe(x, lora_a, lora_b, gate_weight=gate_weight, gate_bias=gate_bias, ...)  # those of the block
            y[:, columns] += where(group == block.group, scale * delta, 0)
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    for block, place in zip(blocks, places_of(blocks), strict=True):
        of_block = factors.of_block(block, place)
        if of_block.gate_logits is not None and of_block.gate_bias is not None:
            of_block = of_block._replace(gate_logits=of_block.gate_logits + of_block.gate_bias)
        delta, _ = forward(x.to(wide), of_block, None, block.options, save=False)
        if groups is not None:
            if groups.scale is not None:
                delta = groups.scale.to(wide)[:, None] * delta
            delta = delta.where((groups.group == block.group)[:, None], 0.0)
        y[:, place.columns] += delta


def backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E), the gradient with respect to the returned router logits
    x: Tensor | None,  # (T, I); may be None if neither the gradient of lora_a nor that of gate_weight is wanted
    factors: Factors,
    saved: Saved,
    options: Options,
    *,
    wanted: Wanted,
) -> Gradients:
    """Compute the gradient of `forward`, equation by equation.

    Returns:
        the wanted gradients: that of x in dy's dtype, the others with the shapes and dtypes of their factors.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    dyw, uw, a, b = dy.to(wide), saved.u.to(wide), factors.lora_a.to(wide), factors.lora_b.to(wide)

    logits = saved.router_logits(factors)
    kept = kept_experts(logits, options.top_k)
    softmax = softmax_among(logits.to(wide), kept, options.renormalize)
    gates = softmax.where(kept, 0.0) if options.softmax else logits.to(wide)
    g = gates[:, :, None]  # (T, E, 1)
    dv = options.scaling * torch.einsum("to,ero->ter", dyw, b)
    if options.averages_factors:
        h = (g * uw).sum(dim=1, keepdim=True)  # A(t) x[t]
        dh = (g * dv).sum(dim=1, keepdim=True)  # B(t)^T dy[t]
        v = g * h
        dgates = (dv * h).sum(dim=-1) + (dh * uw).sum(dim=-1)  # the term of B(t), the term of A(t)
        du = g * dh
    else:
        v = g * uw
        dgates = (dv * uw).sum(dim=-1)
        du = g * dv
    dgates = dgates.where(kept, 0.0)
    dlogits = softmax * (dgates - (gates * dgates).sum(dim=-1, keepdim=True)) if options.softmax else dgates
    if dlogits_in is not None:
        dlogits = dlogits + dlogits_in.to(wide)
    if factors.lora_a.shape[0] == 1:
        du = du.sum(dim=1, keepdim=True)  # a shared A gets the sum over the experts

    dx = dlora_a = dlora_b = dgate_weight = dgate_bias = dgate_logits = None
    if wanted.x:
        dx = torch.einsum("ter,eri->ti", du, a)
        if factors.gate_weight is not None:
            dx = dx + torch.einsum("te,ei->ti", dlogits, factors.gate_weight.to(wide))
        dx = dx.to(dy.dtype)
    if wanted.lora_a:
        assert x is not None
        dlora_a = torch.einsum("ter,ti->eri", du, x.to(wide)).to(factors.lora_a.dtype)
    if wanted.lora_b:
        dlora_b = (options.scaling * torch.einsum("ter,to->ero", v, dyw)).to(factors.lora_b.dtype)
    if wanted.gate_weight:
        assert x is not None
        assert factors.gate_weight is not None
        dgate_weight = torch.einsum("te,ti->ei", dlogits, x.to(wide)).to(factors.gate_weight.dtype)
    if wanted.gate_bias:
        assert factors.gate_bias is not None
        dgate_bias = dlogits.sum(dim=0).to(factors.gate_bias.dtype)
    if wanted.gate_logits:
        dgate_logits = dlogits.to(logits.dtype)
    return Gradients(dx, dlora_a, dlora_b, dgate_weight, dgate_bias, dgate_logits)


def dropout(
    rows: Tensor,  # (T, F)
    seed: Tensor,  # (), int64
    probability: float,  # between 0 and 1, exclusive
) -> Tensor:
    """Set elements to 0 with this probability, and divide the others by 1 - probability.

    The forward applies it to x, the backward to x and to the gradient of `dropout(x)`.

    Returns:
        a new contiguous tensor (T, F) in the dtype of rows. The product is rounded once.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    scale = torch.tensor(1.0 / (1.0 - probability), dtype=wide, device=rows.device)
    tokens, features = rows.shape
    kept = (rows.to(wide) * scale).where(keep_mask(seed, tokens, features, probability), 0.0)
    return kept.to(rows.dtype).contiguous()


def keep_mask(seed: Tensor, tokens: int, features: int, probability: float) -> Tensor:
    """The mask of `dropout`, a bool tensor (T, F): whether a 32-bit hash is at least probability * 2^32.

    Semantics:
        key, other_key = mixed(mixed(low half of seed) ^ token), mixed(mixed(high half of seed ^ 0x9e3779b9) + token)
        keep = mixed(feature ^ key, other_key) >= floor(probability * 2**32)          # in uint32
    """
    token = torch.arange(tokens, device=seed.device)[:, None]
    feature = torch.arange(features, device=seed.device)
    low, high = seed & _UINT32, (seed >> 32) & _UINT32
    key = _mixed(_mixed(low) ^ token)
    other_key = _mixed((_mixed(high ^ 0x9E3779B9) + token) & _UINT32)
    return _mixed(feature ^ key, other_key) >= int(probability * 2**32)


def _mixed(h: Tensor, key: Tensor | int = 0) -> Tensor:
    """A hash of 32-bit numbers, in int64; the key joins halfway. Shifts and constants are those of Wellons' triple32."""
    h = h ^ (h >> 17)
    h = h * 0xED5AD4BB & _UINT32
    h = h ^ (h >> 11) ^ key
    h = h * 0xAC4C1B51 & _UINT32
    h = h ^ (h >> 15)
    h = h * 0x31848BAB & _UINT32
    return h ^ (h >> 14)


_UINT32 = 0xFFFFFFFF
