# SPDX-License-Identifier: Apache-2.0
"""The operation as functions: `lmoe` computes the delta, `lmoe_linear` the frozen linear layer and its delta."""

from typing import Literal, TypedDict, TypeVar, overload

import torch
from torch import Tensor
from typing_extensions import Unpack  # typing has it from Python 3.11 on; torch depends on typing_extensions

from lmoe_kernels import autograd, checks, dispatch, ops
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.dropout import new_seed
from lmoe_kernels.options import Factors, Mixing, Options, Problem

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that autocast casts


class _Keywords(TypedDict, total=False):
    """The keywords that `lmoe` and `lmoe_linear` share, spelled out once for the overloads on `return_router_logits`."""

    gate_weight: Tensor | None
    gate_bias: Tensor | None
    gate_logits: Tensor | None
    gates: Tensor | None
    scaling: float
    mixing: Mixing
    top_k: int | None
    renormalize: bool
    dropout: float
    seed: Tensor | None
    backend: BackendName | None


@overload
def lmoe(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    base: Tensor | None = None,
    return_router_logits: Literal[False] = False,
    **rest: Unpack[_Keywords],
) -> Tensor: ...
@overload
def lmoe(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    base: Tensor | None = None,
    return_router_logits: Literal[True],
    **rest: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def lmoe(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    base: Tensor | None = None,
    return_router_logits: bool,
    **rest: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...
def lmoe(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_logits: Tensor | None = None,
    gates: Tensor | None = None,
    base: Tensor | None = None,
    scaling: float = 1.0,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_router_logits: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the delta that a mixture of LoRA experts adds to the output of a linear layer.

    Semantics:
        g = softmax(x @ gate_weight.T + gate_bias)  # (T, E)
        A = einsum("te,eri->tri", g, lora_a)
        B = einsum("te,ero->tro", g, lora_b)
        delta = scaling * einsum("tro,tri,ti->to", B, A, x)
        # or, with mixing="outputs":
        delta = scaling * einsum("te,ero,eri,ti->to", g, lora_b, lora_a, x)

    Args:
        x: (..., I) in fp32, bf16, fp16 or fp64, with any strides and any number of tokens. Autocast casts it.
        lora_a: (E, R, I), or (1, R, I) for one A that all experts share; x's dtype, or fp32 (master weights).
        lora_b: (E, R, O), x's dtype or fp32. It is the transpose of PEFT's lora_B.weight.
        gate_weight: (E, I), x's dtype or fp32. Exactly one of gate_weight, gate_logits and gates must be given.
        gate_bias: (E), x's dtype or fp32. It is added to the logits; only with gate_weight.
        gate_logits: (..., E), x's dtype or fp32. The logits of an outside router, in place of gate_weight.
        gates: (..., E), x's dtype or fp32. They replace g as they are: any sign, any sum, no softmax. For a mixture with
            fixed weights, or a router with another function than the softmax. top_k must be None: a gate of 0 drops an
            expert. renormalize has no meaning then, and there are no router logits to return.
        base: (..., O), x's dtype. The delta is added to it in the same pass. The tensor itself does not change.
        scaling: factor on the delta (alpha / rank in LoRA's terms).
        mixing: "factors" averages the experts' A and B and multiplies the averages (L-MoE). "outputs" averages the products
            B_e A_e x, like most mixtures of LoRAs; use it for adapters that were trained separately.
        top_k: each token keeps the experts with the k largest logits; of equal logits, the one with the lower expert index.
        renormalize: True computes the softmax over the kept experts, so that their gates sum to 1. False computes it over
            all experts and then sets the gates of the others to 0. With top_k=1, True makes every kept gate 1, and a loss on
            the output does not train the gate.
        dropout: probability with which an element of x is 0 for lora_a, while the others are divided by 1 - dropout, as in a
            LoRA of PEFT. The gate sees x itself. Pass it in training only. The mask is not stored.
        seed: () int64 on x's device. The mask is a function of seed, token and feature, the same in every backend. None
            draws a new seed from PyTorch's generator of that device.
        return_router_logits: also return the logits (..., E) in fp32 (fp64 for fp64). They are differentiable, so that
            balance and z-losses can use them. If gate_logits is given, that tensor is returned.
        backend: "cuda", "triton", "torch" or "reference"; None selects one automatically, see `explain`.

    Returns:
        delta (..., O) in x's dtype, or base + delta; with `return_router_logits` the pair (delta, router_logits).

    Raises:
        ValueError: a shape, a device or an option does not fit, or the named backend cannot take the call.
        TypeError: a type, a layout or a dtype is not supported.

    Source: L-MoE, arXiv 2510.17898.
    """
    outside = _outside("lmoe", gate_logits, gates, return_router_logits)
    factors = Factors(lora_a, lora_b, gate_weight, gate_bias, outside)
    options = Options(scaling, mixing, top_k, renormalize, dropout, gates is None)
    if ops.autocast_is_on():
        x, base = autocast(x), autocast(base)
    checks.check_call("lmoe", x, factors, options)
    if base is not None:
        checks.check_base("lmoe", base, x, lora_b.shape[2])
        base = flat(base)
    return _call("lmoe", x, factors, None, base, seed, options, return_router_logits, backend)


@overload
def lmoe_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    return_router_logits: Literal[False] = False,
    **rest: Unpack[_Keywords],
) -> Tensor: ...
@overload
def lmoe_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    return_router_logits: Literal[True],
    **rest: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...
@overload
def lmoe_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    return_router_logits: bool,
    **rest: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...
def lmoe_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_logits: Tensor | None = None,
    gates: Tensor | None = None,
    scaling: float = 1.0,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_router_logits: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a linear layer with its mixture of LoRA experts.

    The delta is computed first, and the GEMM of the linear layer adds to it. Arguments that are not listed here are those
    of `lmoe`.

    Semantics:
        y = torch.nn.functional.linear(x, weight, bias)
        y = y + lmoe(x, lora_a, lora_b, gate_weight=gate_weight, ...)

    Args:
        x: (..., I), see `lmoe`.
        weight: (O, I), x's dtype, as in `torch.nn.Linear`. It gets a gradient if it requires one.
        bias: (O) or None, x's dtype.

    Returns:
        y (..., O) in x's dtype; with `return_router_logits` the pair (y, router_logits).

    Raises:
        ValueError: as `lmoe`.
        TypeError: as `lmoe`.

    Source: L-MoE, arXiv 2510.17898.
    """
    outside = _outside("lmoe_linear", gate_logits, gates, return_router_logits)
    factors = Factors(lora_a, lora_b, gate_weight, gate_bias, outside)
    options = Options(scaling, mixing, top_k, renormalize, dropout, gates is None)
    if ops.autocast_is_on():
        x, weight, bias = autocast(x), autocast(weight), autocast(bias)
    checks.check_call("lmoe_linear", x, factors, options)
    checks.check_weight("lmoe_linear", weight, bias, x, lora_b.shape[2])
    return _call("lmoe_linear", x, factors, weight, bias, seed, options, return_router_logits, backend)


def explain(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_logits: Tensor | None = None,
    gates: Tensor | None = None,
    scaling: float = 1.0,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    backend: BackendName | None = None,
) -> str:
    """Explain which backend `lmoe` selects for these arguments, and why it does not select the others.

    Nothing is computed. The arguments are those of `lmoe`, without dropout, which does not change the choice.

    Example:
        print(explain(x, lora_a, lora_b, gate_weight=gate_weight))

    Returns:
        a text with one line for the call and one for each backend.

    Raises:
        ValueError: as `lmoe`.
        TypeError: as `lmoe`.
    """
    outside = _outside("explain", gate_logits, gates, return_router_logits=False)
    factors = Factors(lora_a, lora_b, gate_weight, gate_bias, outside)
    x = autocast(x)
    checks.check_call("explain", x, factors, Options(scaling, mixing, top_k, renormalize, softmax=gates is None))
    problem = Problem(factors.sizes(x.shape[:-1].numel()), x.dtype, x.device)
    return dispatch.explain_choice("lmoe", problem, dispatch.requested_backend("explain", backend))


def _outside(op: str, gate_logits: Tensor | None, gates: Tensor | None, return_router_logits: bool) -> Tensor | None:
    """What stands in the factors in place of a gate: the logits of an outside router, or gates that are used as they are."""
    if gates is None:
        return gate_logits
    checks.check_gates(op, gate_logits, return_router_logits)
    return gates


def _call(
    op: str,
    x: Tensor,  # (..., I)
    factors: Factors,
    weight: Tensor | None,  # (O, I)
    base: Tensor | None,  # (O) or (T, O)
    seed: Tensor | None,  # ()
    options: Options,
    return_router_logits: bool,
    backend: BackendName | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Flatten the leading dims of x, apply the Function, and restore the leading dims."""
    checks.check_bool(op, "return_router_logits", return_router_logits)
    name, outside = dispatch.requested_backend(op, backend), factors.gate_logits
    if outside is not None:
        factors = factors._replace(gate_logits=flat(outside))
    if type(options.scaling) is not float or type(options.dropout) is not float:  # the op's schema accepts no other numbers
        options = options._replace(scaling=float(options.scaling), dropout=float(options.dropout))
    if not options.dropout:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    else:
        checks.check_seed(op, seed, x)
    y, logits = autograd.apply(
        flat(x), factors, weight, base, seed, options, return_logits=return_router_logits, backend=name
    )
    y = unflat(y, x)
    if not return_router_logits:
        return y
    if outside is not None:
        return y, outside
    assert logits is not None
    return y, unflat(logits, x)


def unflat(t: Tensor, x: Tensor) -> Tensor:
    """Reshape (T, F) to (..., F) with the leading dims of x."""
    return t if x.dim() == 2 else t.view(*x.shape[:-1], t.shape[1])


def flat(t: _MaybeTensor) -> _MaybeTensor:
    """Reshape (..., F) to (T, F)."""
    if t is None or t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0)


def autocast(t: _MaybeTensor) -> _MaybeTensor:
    """Cast to the autocast dtype if autocast would cast the tensor; otherwise return it unchanged.

    Not used for trained parameters and an outside router's logits or gates, which every backend accepts in fp32.
    """
    if not isinstance(t, Tensor) or t.dtype not in _CAST or t.layout != torch.strided or t.is_meta:
        return t
    if not torch.is_autocast_enabled(t.device.type):
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))
