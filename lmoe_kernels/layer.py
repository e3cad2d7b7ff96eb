"""`LMoELinear`: a frozen linear layer with a trained mixture of LoRA experts beside it."""

import sys
import warnings
from itertools import chain
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.config import CONFIG_KEYS, LayerConfig, refuse_unknown
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.functional import lmoe, lmoe_linear
from lmoe_kernels.options import Mixing


class LMoELinear(nn.Module):
    """A drop-in `nn.Linear` whose weight is frozen and whose experts and gate are trained.

    Semantics:
        y = frozen_layer(x) + lmoe(x, lora_a, lora_b, gate_weight=gate_weight, scaling=alpha / rank, ...)

    Args:
        in_features: I, as in `nn.Linear`.
        out_features: O.
        bias: whether the frozen layer has a bias.
        device: of the frozen layer, the experts and the gate.
        dtype: of the frozen layer.
        num_experts: E.
        rank: R, of one expert.
        alpha: the delta is scaled by alpha / rank; None for 2 * rank times the number of experts that share a token: top_k
            where the gates are renormalised, else num_experts.
        mixing: see `lmoe`.
        top_k: see `lmoe`.
        renormalize: see `lmoe`. With top_k=1 and renormalize=True the kept gate is always 1, so that a loss on the output
            does not train the gate: pass renormalize=False, or train it by losses on `router_logits`.
        backend: see `lmoe`.
        shared_a: one A for all experts, a B for each.
        gate_bias: whether the gate has a bias, zero at the start.
        gate_init_std: standard deviation of the gate's initial weights; None for 1 / sqrt(in_features), under which router
            logits do not depend on the width.
        output_router_logits: keep the logits of the last forward in `router_logits`, for losses on them.

    Attributes:
        frozen_layer: the frozen layer.
        lora_a: (E, R, I) or (1, R, I).
        lora_b: (E, R, O), zero at the start, so that a new layer gives what the frozen one gives.
        gate_weight: (E, I).
        gate_bias: (E) or None. Experts and gate are fp32 whatever the frozen layer's precision (fp64 if it is fp64): in bf16
            the small steps of an optimizer are lost in rounding.
        weight: the frozen layer's, for code that asks for its dtype. A product with it misses the experts.
        bias: the frozen layer's.
        router_logits: (..., E) of the last forward, or None. After a reentrant checkpoint's forward they carry no gradient.
        disabled: whether forward leaves the experts out, see `disable_lmoe`.

    Raises:
        ValueError: an option does not fit; in forward, as `lmoe`.
        TypeError: an option has the wrong type or name; in forward, as `lmoe`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_experts: int = 8,
        rank: int = 16,
        alpha: float | None = None,
        mixing: Mixing = "factors",
        top_k: int | None = None,
        renormalize: bool = True,
        shared_a: bool = False,
        gate_bias: bool = False,
        gate_init_std: float | None = None,
        output_router_logits: bool = False,
        backend: BackendName | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown)
        config = LayerConfig(
            num_experts=num_experts,
            rank=rank,
            alpha=alpha,
            mixing=mixing,
            top_k=top_k,
            renormalize=renormalize,
            shared_a=shared_a,
            gate_bias=gate_bias,
            gate_init_std=gate_init_std,
            output_router_logits=output_router_logits,
            backend=backend,
        )
        self._wrap(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype), config, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        dtype: torch.dtype | None = None,
        *,
        num_experts: int = 8,
        rank: int = 16,
        alpha: float | None = None,
        mixing: Mixing = "factors",
        top_k: int | None = None,
        renormalize: bool = True,
        shared_a: bool = False,
        gate_bias: bool = False,
        gate_init_std: float | None = None,
        output_router_logits: bool = False,
        backend: BackendName | None = None,
        **unknown: NoReturn,
    ) -> "LMoELinear":
        """Wrap a layer, which is frozen and kept, not copied. The other keywords are those of `LMoELinear`.

        Args:
            linear: any module with `in_features` and `out_features`, or transformers' Conv1D. The product of a plain
                `nn.Linear` is computed together with the delta; of any other class (a quantised one, say), or of one with
                hooks or a forward of its own, the forward is called.
            dtype: of experts and gate; None for fp32, or fp64 beside an fp64 layer.

        Raises:
            ValueError: an option does not fit.
            TypeError: the module is no linear layer, or an option has the wrong type or name.
        """
        refuse_unknown(unknown)
        config = LayerConfig(
            num_experts=num_experts,
            rank=rank,
            alpha=alpha,
            mixing=mixing,
            top_k=top_k,
            renormalize=renormalize,
            shared_a=shared_a,
            gate_bias=gate_bias,
            gate_init_std=gate_init_std,
            output_router_logits=output_router_logits,
            backend=backend,
        )
        return cls.from_config(linear, config, dtype)

    @classmethod
    def from_config(cls, linear: nn.Module, config: LayerConfig, dtype: torch.dtype | None = None) -> "LMoELinear":
        """`from_linear` with its keywords in one tuple."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._wrap(linear, config, dtype)
        return layer

    def _wrap(self, linear: nn.Module, config: LayerConfig, dtype: torch.dtype | None) -> None:
        features = features_of(linear)
        if features is None:
            got = type(linear).__name__
            checks.fail("LMoELinear", "linear", "be a module with in_features and out_features", got, TypeError)
        config.check()
        alpha = config.alpha if config.alpha is not None else config.default_alpha()
        weight = weight_of(linear)
        if dtype is None:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        elif dtype not in checks.DTYPES:
            checks.fail("LMoELinear", "dtype", f"be one of {', '.join(map(str, checks.DTYPES))}", dtype, TypeError)

        self.in_features, self.out_features = features
        self.num_experts, self.rank = config.num_experts, config.rank
        self.alpha, self.scaling = alpha, alpha / config.rank
        self.mixing, self.top_k, self.renormalize = config.mixing, config.top_k, config.renormalize
        self.shared_a, self.has_gate_bias, self.gate_init_std = config.shared_a, config.gate_bias, config.gate_init_std
        self.output_router_logits, self.backend = config.output_router_logits, config.backend
        self.router_logits: Tensor | None = None
        self.disabled = False

        parameters = {
            key: nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)) for key, shape in self.shapes().items()
        }
        self.lora_a, self.lora_b, self.gate_weight = parameters["lora_a"], parameters["lora_b"], parameters["gate_weight"]
        self.gate_bias: nn.Parameter | None
        self.register_parameter("gate_bias", parameters.get("gate_bias"))
        self.frozen_layer = linear.requires_grad_(False)  # last: an error before leaves the layer as it was
        self.reset_parameters()
        if config.top_k == 1 and config.renormalize and config.num_experts > 1:
            warnings.warn(
                "LMoELinear: top_k=1 with renormalize=True: the kept gate is always 1, so the language-modelling loss does "
                "not train the gate; pass renormalize=False",
                stacklevel=3,
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of experts and gate, by name."""
        return LayerConfig(**self.config()).shapes(self.in_features, self.out_features)

    def reset_parameters(self) -> None:
        """Draw A as PEFT does (Kaiming uniform, a = sqrt 5, over I) and the gate normal; B and the gate's bias are zero."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)
        nn.init.normal_(self.gate_weight, std=bound if self.gate_init_std is None else self.gate_init_std)
        if self.gate_bias is not None:
            nn.init.zeros_(self.gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to y (..., O)."""
        if self.router_logits is not None:
            self.router_logits = None  # no loss may see an older batch's, should this forward fail or keep none
        base = self.frozen_layer
        if self.disabled:
            return base(x)
        if self.training and not torch.compiler.is_compiling():
            self._warn_of_frozen_parameters()
        factors = self.lora_a, self.lora_b
        options: dict[str, Any] = {
            "gate_weight": self.gate_weight,
            "gate_bias": self.gate_bias,
            "scaling": self.scaling,
            "mixing": self.mixing,
            "top_k": self.top_k,
            "renormalize": self.renormalize,
            "backend": self.backend,
            "return_router_logits": self.output_router_logits,
        }
        if _is_plain_linear(base):
            result = lmoe_linear(x, base.weight, base.bias, *factors, **options)
        else:
            result = lmoe(x, *factors, base=base(x), **options)
        if isinstance(result, tuple):
            result, self.router_logits = result
        return result

    def _warn_of_frozen_parameters(self) -> None:
        """PEFT freezes everything that was there before its own layers, and says nothing."""
        frozen = not any(parameter.requires_grad for parameter in (self.lora_a, self.lora_b, self.gate_weight))
        if frozen and "peft" in sys.modules and torch.is_grad_enabled():
            warnings.warn(
                "LMoELinear: lora_a, lora_b, gate_weight of a model that is trained are frozen. get_peft_model does that to "
                "what it finds: call it before apply_lmoe, or train_lmoe(model) after it, before the optimizer is made.",
                stacklevel=3,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the frozen layer's tensors under the names of the plain model too, as files of the plain model have them."""
        own = (*self._parameters, *self._modules)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            if rest.partition(".")[0] not in own:
                state_dict.setdefault(f"{prefix}frozen_layer.{rest}", state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def weight(self) -> Any:
        """The frozen layer's weight: some models read its dtype (transformers' T5)."""
        return self.frozen_layer.weight

    @property
    def bias(self) -> Any:
        """The frozen layer's bias."""
        return self.frozen_layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        """Redirect weight and bias to the frozen layer, so that tying them to an embedding's works."""
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
        own = {"gate_bias": self.has_gate_bias}  # self.gate_bias is the parameter
        return {name: own[name] if name in own else getattr(self, name) for name in CONFIG_KEYS}

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
        if not self.renormalize:
            shown["renormalize"] = False
        if self.shared_a:
            shown["shared_a"] = True
        if self.has_gate_bias:
            shown["gate_bias"] = True
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, "
        return sizes + ", ".join(f"{name}={value}" for name, value in shown.items())

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not take the last forward's logits along, whose graph cannot be copied."""
        return {**self.__dict__, "router_logits": None}


def features_of(linear: nn.Module) -> tuple[int, int] | None:
    """In and out features of a linear layer; None where a module is none."""
    features = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    weight, width = getattr(linear, "weight", None), getattr(linear, "nf", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and width == weight.shape[1]:  # transformers' Conv1D
        return weight.shape[0], weight.shape[1]
    return None


def weight_of(linear: nn.Module) -> Tensor:
    """The tensor whose device and dtype are the layer's."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return next(chain(linear.parameters(), linear.buffers()), torch.empty(0))  # GPTQ's layers have buffers alone


def _is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer does nothing but `F.linear` on plain tensors, so that its product may be fused."""
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__  # replaced on the object, as accelerate does where it moves weights
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )
