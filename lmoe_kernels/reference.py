"""The mathematics of L-MoE, written to be read: a literal forward and an explicit backward.

A frozen linear layer carries E LoRA experts of rank R and a gate. For every token t:

    logits[t,e] = sum_i x[t,i] gate_weight[e,i]
    gates[t]    = softmax(logits[t])                              over all experts
    gates[t]    = softmax(logits[t, kept])                        top_k: over the k largest; the others are 0
    gates[t]    = softmax(logits[t])[kept]                        top_k, renormalize=False; the others are 0
    A(t), B(t)  = sum_e gates[t,e] A_e,  sum_e gates[t,e] B_e      mixing="factors"
    delta[t]    = scaling * B(t) A(t) x[t]
    delta[t]    = scaling * sum_e gates[t,e] B_e A_e x[t]          mixing="outputs"

`forward` builds those per-token matrices as they stand, so it is slow and large: it is the definition, not an
implementation. `backward` is the gradient of the same function, equation by equation. Both have the signatures of every
backend, so every backend is tested against them.

The gradient of the gate under mixing="factors" deserves a second look. It is tempting to write
`dL/dgates[t,e] = <dL/ddelta[t], B_e A_e x[t]>`, which is right for mixing="outputs" and wrong here: a gate enters twice,
once through B(t) and once through A(t), so that

    dL/dgates[t,e] = scaling * ( <dy[t], B_e A(t) x[t]>  +  <dy[t], B(t) A_e x[t]> )

with all the cross terms B_e A_f. Because delta is of degree two in the gates, Euler's identity gives a check:
`sum_e gates[t,e] dL/dgates[t,e] = 2 <dy[t], delta[t]>`.

Renormalised gates of one kept expert are 1 whatever its logit, so no gradient reaches the gate. Under renormalize=False the
logits of dropped experts have gradients too, since they stand in the softmax's denominator:

    dL/dlogits[t,e] = softmax(logits[t])[e] * ([e kept] dL/dgates[t,e] - sum_{f kept} gates[t,f] dL/dgates[t,f])

Letters: T tokens, I in_features, O out_features, E experts, R rank. Source: L-MoE, arXiv 2510.17898.
"""

import torch
from torch import Tensor


def gate_softmax(logits: Tensor, top_k: int | None = None, renormalize: bool = True) -> Tensor:
    """The gates: a softmax of which each token keeps the `top_k` experts of the largest logits, the others 0.

    Of equal logits the one of the lower expert index is kept.

    Args:
        logits: (T, E), any floating dtype.
        top_k: experts kept for each token, None for all.
        renormalize: whether the softmax runs over the experts kept, or over all.

    Returns:
        gates (T, E). Each row sums to 1, or to less where a softmax over all experts has lost some.
    """
    kept = kept_experts(logits, top_k)
    return softmax_among(logits, kept, renormalize).where(kept, 0.0)


def kept_experts(logits: Tensor, top_k: int | None) -> Tensor:
    """Which experts each token keeps: (T, E) of bool."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is None or top_k >= logits.shape[-1]:
        return kept
    dropped = logits.argsort(dim=-1, descending=True, stable=True)[..., top_k:]
    return kept.scatter(-1, dropped, False)


def softmax_among(logits: Tensor, kept: Tensor, renormalize: bool) -> Tensor:
    """Softmax (T, E) over the experts kept, or over all."""
    return logits.where(kept, float("-inf")).softmax(dim=-1) if renormalize else logits.softmax(dim=-1)


def forward(
    x: Tensor,  # (T, I)
    lora_a: Tensor,  # (E, R, I), or (1, R, I) shared by all experts
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I), or None where gate_logits is given
    gate_logits: Tensor | None,  # (T, E), the logits of an outside router
    base: Tensor | None,  # (O) or (T, O), what the delta is added to
    scaling: float,
    mixing: str,
    top_k: int | None,
    renormalize: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition, with every per-token matrix built.

    Semantics:
        A, B = einsum("te,eri->tri", gates, lora_a), einsum("te,ero->tro", gates, lora_b)
        y = base + scaling * einsum("tro,tri,ti->to", B, A, x)          (mixing="factors")

    Returns:
        y (T, O) in x's dtype. Where `save` is set also logits (T, E) in fp32 (fp64 for fp64; None where they came from
        outside) and u (T, E, R) in x's dtype, which `backward` wants; else None, None. A backend may leave u unwritten for
        experts that a token does not keep: `backward` does not read them.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    xw, a, b = x.to(wide), lora_a.to(wide), lora_b.to(wide)

    if gate_weight is not None:
        logits = torch.einsum("ti,ei->te", xw, gate_weight.to(wide))
    else:
        assert gate_logits is not None
        logits = gate_logits.to(wide)
    gates = gate_softmax(logits, top_k, renormalize)

    a_of_expert = a.expand(b.shape[0], -1, -1)
    if mixing == "factors":
        a_of_token = torch.einsum("te,eri->tri", gates, a_of_expert)
        b_of_token = torch.einsum("te,ero->tro", gates, b)
        delta = torch.einsum("tro,tri,ti->to", b_of_token, a_of_token, xw)
    else:
        product_of_expert = torch.einsum("ero,eri->eoi", b, a_of_expert)
        product_of_token = torch.einsum("te,eoi->toi", gates, product_of_expert)
        delta = torch.einsum("toi,ti->to", product_of_token, xw)

    y = scaling * delta if base is None else base.to(wide) + scaling * delta
    if not save:
        return y.to(x.dtype), None, None
    u = torch.einsum("ti,eri->ter", xw, a)
    return y.to(x.dtype), logits if gate_weight is not None else None, u.to(x.dtype)


def backward(
    dy: Tensor,  # (T, O)
    dlogits_in: Tensor | None,  # (T, E), the gradient that arrives at the returned router logits
    x: Tensor | None,  # (T, I), None where neither lora_a nor the gate wants a gradient
    lora_a: Tensor,  # (E, R, I) or (1, R, I)
    lora_b: Tensor,  # (E, R, O)
    gate_weight: Tensor | None,  # (E, I)
    logits: Tensor,  # (T, E), forward's or the outside router's
    u: Tensor,  # (T, E, R) or (T, 1, R)
    scaling: float,
    mixing: str,
    top_k: int | None,
    renormalize: bool,
    output_mask: tuple[bool, bool, bool, bool],  # of the four results
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of `forward`, equation by equation.

    Returns:
        dx (T, I) in dy's dtype; dlora_a and dlora_b shaped and typed as their parameters; the gate's gradient: that of
        gate_weight (E, I), or, where the logits came from outside, that of the logits (T, E), typed as they are. None
        where `output_mask` does not ask.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    want_x, want_a, want_b, want_gate = output_mask
    dyw, uw, a, b = dy.to(wide), u.to(wide), lora_a.to(wide), lora_b.to(wide)

    kept = kept_experts(logits, top_k)
    softmax = softmax_among(logits.to(wide), kept, renormalize)
    gates = softmax.where(kept, 0.0)
    g = gates[:, :, None]  # (T, E, 1)
    dv = scaling * torch.einsum("to,ero->ter", dyw, b)
    if mixing == "factors":
        h = (g * uw).sum(dim=1, keepdim=True)  # A(t) x[t]
        dh = (g * dv).sum(dim=1, keepdim=True)  # B(t)^T dy[t]
        v = g * h
        dgates = (dv * h).sum(dim=-1) + (dh * uw).sum(dim=-1)  # through B(t), and through A(t)
        du = g * dh
    else:
        v = g * uw
        dgates = (dv * uw).sum(dim=-1)
        du = g * dv
    dgates = dgates.where(kept, 0.0)
    dlogits = softmax * (dgates - (gates * dgates).sum(dim=-1, keepdim=True))
    if dlogits_in is not None:
        dlogits = dlogits + dlogits_in.to(wide)
    if lora_a.shape[0] == 1:
        du = du.sum(dim=1, keepdim=True)  # a shared A gathers from every expert

    dx = dlora_a = dlora_b = dgate = None
    if want_x:
        dx = torch.einsum("ter,eri->ti", du, a)
        if gate_weight is not None:
            dx = dx + torch.einsum("te,ei->ti", dlogits, gate_weight.to(wide))
        dx = dx.to(dy.dtype)
    if want_a:
        assert x is not None
        dlora_a = torch.einsum("ter,ti->eri", du, x.to(wide)).to(lora_a.dtype)
    if want_b:
        dlora_b = (scaling * torch.einsum("ter,to->ero", v, dyw)).to(lora_b.dtype)
    if want_gate and gate_weight is not None:
        assert x is not None
        dgate = torch.einsum("te,ti->ei", dlogits, x.to(wide)).to(gate_weight.dtype)
    elif want_gate:
        dgate = dlogits.to(logits.dtype)
    return dx, dlora_a, dlora_b, dgate
