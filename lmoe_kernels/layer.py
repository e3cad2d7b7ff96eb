"""`LMoELinear`: a frozen linear layer with a trained mixture of LoRA experts beside it."""

from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.dispatch import check_name
from lmoe_kernels.functional import lmoe, lmoe_linear

CONFIG_KEYS = ("num_experts", "rank", "alpha", "mixing", "top_k", "shared_a")


class LMoELinear(nn.Module):
    """A drop-in `nn.Linear` whose weight is frozen and whose experts and gate are trained.

    Semantics:
        y = frozen_layer(x) + lmoe(x, lora_a, lora_b, gate_weight=gate_weight, scaling=alpha / rank, ...)
    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; they make the frozen layer.
        num_experts, rank: E and R.
        alpha: the delta is scaled by alpha / rank; None for a scaling of 1.
        mixing, top_k, backend: see `lmoe`.
        shared_a: one A for all experts, a B for each.
        gate_init_std: standard deviation of the gate's initial weights.
        output_router_logits: keep the logits of the last forward in `router_logits`, for losses on them.
    Attributes:
        frozen_layer: the frozen layer. lora_a: (E, R, I) or (1, R, I). lora_b: (E, R, O), zero at the start, so that a new
        layer gives what the frozen one gives. gate_weight: (E, I).
        weight, bias: the frozen layer's, for who asks for their dtype or device. Who multiplies by them misses the experts.
        router_logits: (..., E) of the last forward, or None. After a reentrant checkpoint's forward they carry no gradient.
    Raises:
        ValueError, TypeError: an option does not fit; in forward, as `lmoe`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._wrap(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype), None, **options)

    @classmethod
    def from_linear(cls, linear: nn.Module, dtype: torch.dtype | None = None, **options: Any) -> "LMoELinear":
        """Wrap a layer, which is frozen and kept, not copied.

        Args:
            linear: any module with `in_features` and `out_features`. The product of a plain `nn.Linear` is computed
                together with the delta; of any other class (a quantised one, say), or of one with hooks or a forward of
                its own, the forward is called.
            dtype: of experts and gate; None for the weight's, or fp32 where that is not a floating dtype of `lmoe`.
            options: the keywords of `LMoELinear`.
        Raises:
            TypeError: the module has no `in_features` and `out_features`.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._wrap(linear, dtype, **options)
        return layer

    def _wrap(
        self,
        linear: nn.Module,
        dtype: torch.dtype | None,
        *,
        num_experts: int = 8,
        rank: int = 16,
        alpha: float | None = None,
        mixing: str = "factors",
        top_k: int | None = None,
        shared_a: bool = False,
        gate_init_std: float = 0.02,
        output_router_logits: bool = False,
        backend: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = ", ".join(map(repr, LMoELinear._wrap.__kwdefaults__ or ()))
            checks.fail("LMoELinear", "options", f"be among {known}", ", ".join(map(repr, unknown)), TypeError)
        in_features, out_features = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
        if not isinstance(in_features, int) or not isinstance(out_features, int):
            got = type(linear).__name__
            checks.fail("LMoELinear", "linear", "be a module with in_features and out_features", got, TypeError)
        checks.check_positive_int("LMoELinear", "num_experts", num_experts)
        checks.check_positive_int("LMoELinear", "rank", rank)
        if alpha is not None and not isinstance(alpha, Real):
            checks.fail("LMoELinear", "alpha", "be None or a number", type(alpha).__name__, TypeError)
        scaling = 1.0 if alpha is None else alpha / rank
        checks.check_options("LMoELinear", num_experts, scaling, mixing, top_k)
        if not isinstance(gate_init_std, Real) or not gate_init_std >= 0:
            checks.fail("LMoELinear", "gate_init_std", "be a number of at least 0", repr(gate_init_std))
        if backend is not None:
            check_name("LMoELinear", backend)
        weight = weight_of(linear)
        if dtype is None:
            dtype = weight.dtype if weight.dtype in checks.DTYPES else torch.float32
        elif dtype not in checks.DTYPES:
            checks.fail("LMoELinear", "dtype", f"be one of {', '.join(map(str, checks.DTYPES))}", dtype, TypeError)

        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.rank, self.alpha, self.scaling = num_experts, rank, alpha, scaling
        self.mixing, self.top_k, self.shared_a = mixing, top_k, shared_a
        self.gate_init_std, self.output_router_logits, self.backend = gate_init_std, output_router_logits, backend
        self.router_logits: Tensor | None = None

        self.frozen_layer = linear.requires_grad_(False)
        like = {"device": weight.device, "dtype": dtype}
        self.lora_a = nn.Parameter(torch.empty(1 if shared_a else num_experts, rank, in_features, **like))
        self.lora_b = nn.Parameter(torch.empty(num_experts, rank, out_features, **like))
        self.gate_weight = nn.Parameter(torch.empty(num_experts, in_features, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A as PEFT does (Kaiming uniform, a = sqrt 5, over I), B zero, the gate normal. The frozen layer stays."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)
        nn.init.normal_(self.gate_weight, std=self.gate_init_std)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to y (..., O)."""
        factors = self.lora_a, self.lora_b
        options: dict[str, Any] = {
            "gate_weight": self.gate_weight,
            "scaling": self.scaling,
            "mixing": self.mixing,
            "top_k": self.top_k,
            "backend": self.backend,
            "return_router_logits": self.output_router_logits,
        }
        base = self.frozen_layer
        if _is_plain_linear(base):
            result = lmoe_linear(x, base.weight, base.bias, *factors, **options)
        else:
            result = lmoe(x, *factors, base=base(x), **options)
        if isinstance(result, tuple):
            result, self.router_logits = result
        return result

    @property
    def weight(self) -> Any:
        """The frozen layer's weight: some models read its dtype (transformers' T5)."""
        return self.frozen_layer.weight

    @property
    def bias(self) -> Any:
        """The frozen layer's bias."""
        return self.frozen_layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        """Who ties this layer's weight to an embedding's means the frozen layer's."""
        if name in ("weight", "bias"):
            setattr(self.frozen_layer, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def num_trainable_parameters(self) -> int:
        """How many numbers of this layer are trained: those of experts and gate, unless the user says otherwise."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def config(self) -> dict[str, Any]:
        """The options that decide what the layer computes: those that a checkpoint keeps."""
        return {name: getattr(self, name) for name in CONFIG_KEYS}

    def extra_repr(self) -> str:
        """Sizes and options, as `print(model)` shows them."""
        shown: dict[str, Any] = {
            "num_experts": self.num_experts,
            "rank": self.rank,
            "scaling": self.scaling,
            "mixing": self.mixing,
        }
        if self.top_k is not None:
            shown["top_k"] = self.top_k
        if self.shared_a:
            shown["shared_a"] = True
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, "
        return sizes + ", ".join(f"{name}={value}" for name, value in shown.items())

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not take the last forward's logits along, whose graph cannot be copied."""
        return {**self.__dict__, "router_logits": None}


def weight_of(linear: nn.Module) -> Tensor:
    """The tensor whose device and dtype are the layer's."""
    weight = getattr(linear, "weight", None)
    return weight if isinstance(weight, Tensor) else next(linear.parameters(), torch.empty(0))


def _is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer does nothing but `F.linear` on plain tensors, so that its product may be fused."""
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__  # replaced on the object, as accelerate does where it moves weights
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )
