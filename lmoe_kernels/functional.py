"""The operation as functions: `lmoe`, the delta alone, and `lmoe_linear`, with its frozen linear layer."""

from typing import Literal, TypedDict, TypeVar, overload

import torch
from torch import Tensor
from typing_extensions import Unpack  # in typing from Python 3.11 on; torch requires it

from lmoe_kernels import autograd, checks, dispatch
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.options import Factors, Mixing, Options, Problem

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, Tensor | None)
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts: neither fp64 nor integers


class _Keywords(TypedDict, total=False):
    """The keywords that `lmoe` and `lmoe_linear` share, for type checkers: overloads on `return_router_logits`."""

    gate_weight: Tensor | None
    gate_bias: Tensor | None
    gate_logits: Tensor | None
    scaling: float
    mixing: Mixing
    top_k: int | None
    renormalize: bool
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
    base: Tensor | None = None,
    scaling: float = 1.0,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    return_router_logits: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mixture of LoRA experts: what it adds to a linear layer's output.

    Semantics (mixing="factors"; x of shape (T, I)):
        g = softmax(x @ gate_weight.T);  A, B = einsum("te,eri->tri", g, lora_a), einsum("te,ero->tro", g, lora_b)
        delta = scaling * einsum("tro,tri,ti->to", B, A, x)

    Args:
        x: (..., I) fp32 | bf16 | fp16 | fp64, any strides, any number of tokens. Under autocast it is cast first.
        lora_a: (E, R, I), or (1, R, I): one A shared by all experts. x's dtype, or fp32 (master weights).
        lora_b: (E, R, O), x's dtype or fp32. Rank before features: PEFT's lora_B.weight, transposed.
        gate_weight: (E, I), x's dtype or fp32. The gate; either this or gate_logits.
        gate_bias: (E), x's dtype or fp32. Added to the logits of gate_weight.
        gate_logits: (..., E), x's dtype or fp32. The logits of an outside router.
        base: (..., O), x's dtype. The delta is added to it in the same pass; it is not written to.
        scaling: factor on the delta (alpha / rank in LoRA's terms).
        mixing: "factors" averages the experts' A and B and multiplies the averages (L-MoE); "outputs" averages the
            products B_e A_e x (most mixtures of LoRAs; right for adapters that were trained apart).
        top_k: keep the experts of the k largest logits of each token; of equal ones the lower expert index.
        renormalize: with top_k, whether the softmax runs over the kept experts alone, so that their gates sum to 1, or over
            all experts, those not kept getting 0 afterwards. With top_k=1 the first makes every gate 1: a loss on the output
            then does not train the gate.
        return_router_logits: also return the logits, (..., E) in fp32 (fp64 for fp64), differentiable: balance and
            z losses are written on them. Where gate_logits are given, these are returned as they are.
        backend: "torch", "reference", ...; None takes the fastest that can, see `explain`.

    Returns:
        delta (..., O) in x's dtype, or base + delta; with `return_router_logits` the pair (delta, router_logits).

    Raises:
        ValueError: a shape, a device or an option does not fit, or the named backend cannot take the call.
        TypeError: a type, a layout or a dtype is not supported.

    Source: L-MoE, arXiv 2510.17898.
    """
    factors = Factors(lora_a, lora_b, gate_weight, gate_bias, gate_logits)
    options = Options(scaling, mixing, top_k, renormalize)
    x, base = _autocast(x), _autocast(base)
    checks.check_call("lmoe", x, factors, options)
    if base is not None:
        checks.check_base("lmoe", base, x, lora_b.shape[2])
        base = _flat(base)
    return _call("lmoe", x, factors, None, base, options, return_router_logits, backend)


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
    scaling: float = 1.0,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    return_router_logits: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer and its mixture of LoRA experts, in the cheapest order: the delta first, the layer's GEMM adds to it.

    Semantics:
        y = torch.nn.functional.linear(x, weight, bias) + lmoe(x, lora_a, lora_b, gate_weight=gate_weight, ...)

    Args:
        weight: (O, I), x's dtype, as in `torch.nn.Linear`. It gets a gradient where it requires one.
        bias: (O) or None, x's dtype.
        The others: see `lmoe`.

    Returns:
        y (..., O) in x's dtype; with `return_router_logits` the pair (y, router_logits).

    Raises:
        ValueError: as `lmoe`.
        TypeError: as `lmoe`.
    """
    factors = Factors(lora_a, lora_b, gate_weight, gate_bias, gate_logits)
    options = Options(scaling, mixing, top_k, renormalize)
    x, weight, bias = _autocast(x), _autocast(weight), _autocast(bias)
    checks.check_call("lmoe_linear", x, factors, options)
    checks.check_weight("lmoe_linear", weight, bias, x, lora_b.shape[2])
    return _call("lmoe_linear", x, factors, weight, bias, options, return_router_logits, backend)


def explain(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_logits: Tensor | None = None,
    scaling: float = 1.0,
    mixing: Mixing = "factors",
    top_k: int | None = None,
    renormalize: bool = True,
    backend: BackendName | None = None,
) -> str:
    """Which backend `lmoe` takes for these arguments, and why not the others: one line each, nothing is computed.

    Example:
        print(explain(x, lora_a, lora_b, gate_weight=gate_weight))

    Raises:
        ValueError: as `lmoe`.
        TypeError: as `lmoe`.
    """
    factors = Factors(lora_a, lora_b, gate_weight, gate_bias, gate_logits)
    x = _autocast(x)
    checks.check_call("explain", x, factors, Options(scaling, mixing, top_k, renormalize))
    problem = Problem(factors.sizes(x.shape[:-1].numel()), x.dtype, x.device)
    return dispatch.explain_choice("lmoe", problem, dispatch.asked_for("explain", backend))


def _call(
    op: str,
    x: Tensor,  # (..., I)
    factors: Factors,
    weight: Tensor | None,  # (O, I)
    base: Tensor | None,  # (O) or (T, O)
    options: Options,
    return_router_logits: bool,
    backend: BackendName | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Flatten the tokens, apply the Function, give the leading dims back."""
    checks.check_bool(op, "return_router_logits", return_router_logits)
    name, outside = dispatch.asked_for(op, backend), factors.gate_logits
    if outside is not None:
        factors = factors._replace(gate_logits=_flat(outside))
    if type(options.scaling) is not float:  # another kind of number, which the op does not take
        options = options._replace(scaling=float(options.scaling))
    y, logits = autograd.apply(_flat(x), factors, weight, base, options, return_logits=return_router_logits, backend=name)
    y = _unflat(y, x)
    if not return_router_logits:
        return y
    return y, _unflat(logits, x) if outside is None else outside


def _unflat(t: Tensor, x: Tensor) -> Tensor:
    """(T, F) with the leading dims of x."""
    return t if x.dim() == 2 else t.view(*x.shape[:-1], t.shape[1])


def _flat(t: _MaybeTensor) -> _MaybeTensor:
    """(..., F) as (T, F)."""
    if t is None or t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0)


def _autocast(t: _MaybeTensor) -> _MaybeTensor:
    """Cast to the autocast dtype if autocast would cast the tensor; otherwise return it unchanged.

    Trained parameters and an outside router's logits are not cast: they may be fp32.
    """
    if not isinstance(t, Tensor) or t.dtype not in _CAST or t.layout != torch.strided or t.is_meta:
        return t
    if not torch.is_autocast_enabled(t.device.type):
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))
