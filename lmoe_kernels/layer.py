# SPDX-License-Identifier: Apache-2.0
"""`LMoELinear`: a frozen linear layer with a trained mixture of LoRA experts."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.config import LayerConfig, RouterReads, RouterScope, refuse_unknown
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.layer_options import WithOptions
from lmoe_kernels.linears import InPlaceOfLinear, features_of, weight_of
from lmoe_kernels.mixture import Choice, LayerWithExperts, Mixture, add_experts, initialise
from lmoe_kernels.options import Mixing
from lmoe_kernels.routers import Router
from lmoe_kernels.stack_group import InGroup

_ADAPTER = "default"  # the name of the only mixture of an `LMoELinear`


class LMoELinear(InGroup, WithOptions, InPlaceOfLinear, LayerWithExperts):
    """A replacement for `nn.Linear` with a frozen weight and a trained mixture of LoRA experts.

    Semantics:
        y = frozen_layer(x) + lmoe(x, lora_a, lora_b, gate_weight=gate_weight, scaling=alpha / rank, ...)

    Args:
        in_features: I, as in `nn.Linear`.
        out_features: O, as in `nn.Linear`.
        bias: whether the frozen layer has a bias.
        device: device of the frozen layer, the experts and the gate.
        dtype: dtype of the frozen layer.
        num_experts: E, the number of experts.
        rank: R, the rank of each expert.
        alpha: the delta is multiplied by alpha / rank. None for 2 * rank * n, where n experts share a token: n is top_k if
            the gates are renormalised, else num_experts.
        mixing: see `lmoe`.
        top_k: see `lmoe`.
        renormalize: see `lmoe`. With top_k=1 and renormalize=True the kept gate is always 1, and a loss on the output does
            not train the gate: pass renormalize=False, or train the gate with a loss on `router_logits`.
        backend: see `lmoe`.
        shared_a: whether all experts share one A; each has its own B.
        gate_bias: whether the gate has a bias. It is initialised to zero.
        choice_bias: whether the choice of `top_k` adds a bias to the logits, which `balance_experts` moves towards equal use
            of the experts. The gates are computed without it. Needs top_k and renormalize=True.
        expert_names: one name for each expert. None for their numbers, "0" and so on.
        router: which layers share a gate: "layer", none; "group", those of a module that read the same input (q, k and v;
            gate and up); "block", all of a block; "model", all of a stack of blocks. The gate of a block reads the block's
            input, that of the model the input of the first block with such layers, normalised (RMS). `apply_lmoe` connects
            the layers; a layer alone has no router.
        router_reads: "token", or "prefix" for the running mean of what the gate reads over the sequence up to the token,
            normalised (RMS). It continues with a cache of keys and values, and respects padding and packing.
        dropout: see `lmoe`; in training mode only.
        gate_init_std: standard deviation of the gate's initial weights. None for 1 / sqrt(in_features), which makes the
            scale of the router logits independent of in_features.
        output_router_logits: whether to keep the logits of the last forward in `router_logits`, for losses on them.

    Attributes:
        frozen_layer: the frozen linear layer.
        lora_a: (E, R, I), or (1, R, I) with shared_a. Experts and gate are fp32 for every dtype of the frozen layer except
            fp64, because bf16 would round the small steps of an optimizer away.
        lora_b: (E, R, O), initialised to zero, so that a new layer computes what the frozen layer computes.
        gate_weight: (E, I), or None if a router computes the logits.
        gate_bias: (E) or None.
        router: the `Router` that this layer has, if it is the first of those that share it, or None.
        choice_bias: (E) in fp32, a buffer, or None.
        load: (E) in fp32, how many tokens chose each expert in training since `balance_experts` was last called, or None.
        weight: the frozen layer's weight, for code that reads its dtype. A product with it does not include the experts.
        bias: the frozen layer's bias.
        router_logits: (..., E) of the last forward, or None. They have no gradient after a forward under reentrant
            activation checkpointing.
        disabled: whether forward skips the experts, see `disable_lmoe`.

    Raises:
        ValueError: an option does not fit; in forward, as `lmoe`.
        TypeError: an option has the wrong type or an unknown name; in forward, as `lmoe`.

    Source: L-MoE, arXiv 2510.17898.
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
        choice_bias: bool = False,
        expert_names: Sequence[str] | None = None,
        router: RouterScope = "layer",
        router_reads: RouterReads = "token",
        dropout: float = 0.0,
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
            choice_bias=choice_bias,
            expert_names=expert_names,
            router=router,
            router_reads=router_reads,
            dropout=dropout,
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
        choice_bias: bool = False,
        expert_names: Sequence[str] | None = None,
        router: RouterScope = "layer",
        router_reads: RouterReads = "token",
        dropout: float = 0.0,
        gate_init_std: float | None = None,
        output_router_logits: bool = False,
        backend: BackendName | None = None,
        **unknown: NoReturn,
    ) -> "LMoELinear":
        """Create an `LMoELinear` around a linear layer, which is frozen and not copied.

        The other keywords are those of `LMoELinear`.

        Args:
            linear: any module with `in_features` and `out_features`, or transformers' Conv1D. The product of a plain
                `nn.Linear` is computed together with the delta. Any other layer is called: one of another class (for
                example a quantised one), with hooks, or with a forward that was replaced on the instance.
            dtype: dtype of experts and gate; None for fp32, or fp64 if the linear layer is fp64.

        Returns:
            the new layer, whose `frozen_layer` is `linear`.

        Raises:
            ValueError: an option does not fit.
            TypeError: `linear` is not a linear layer, or an option has the wrong type or an unknown name.
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
            choice_bias=choice_bias,
            expert_names=expert_names,
            router=router,
            router_reads=router_reads,
            dropout=dropout,
            gate_init_std=gate_init_std,
            output_router_logits=output_router_logits,
            backend=backend,
        )
        return cls.from_config(linear, config, dtype)

    @classmethod
    def from_config(cls, linear: nn.Module, config: LayerConfig, dtype: torch.dtype | None = None) -> "LMoELinear":
        """Create an `LMoELinear` around a linear layer, like `from_linear`, with the options in a `LayerConfig`.

        Args:
            linear: see `from_linear`.
            config: the options.
            dtype: see `from_linear`.

        Returns:
            the new layer, whose `frozen_layer` is `linear`.

        Raises:
            ValueError: an option does not fit.
            TypeError: `linear` is not a linear layer, or an option has the wrong type.
        """
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
        self.disabled = False
        empty = {
            key: torch.empty(shape, device=weight.device, dtype=torch.float32 if key == "choice_bias" else dtype)
            for key, shape in config.shapes(*features).items()
        }
        self._set_options(config._replace(alpha=alpha))
        self.router: Router | None = None
        self._uses: tuple[Router, int] | None = None  # the router, which may belong to another layer, and its layers
        self._set_tensors(empty)
        self.frozen_layer = linear.requires_grad_(False)  # after everything that can fail: an error leaves it unchanged
        self.reset_parameters()
        if config.top_k == 1 and config.renormalize and config.num_experts > 1:
            warnings.warn(
                "LMoELinear: top_k=1 with renormalize=True: the kept gate is always 1, so the language-modelling loss does "
                "not train the gate; pass renormalize=False",
                stacklevel=3,
            )

    def _set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these tensors the parameters and buffers of the layer. Those that are parameters already stay the same."""
        of_choice = tensors.get("choice_bias")
        parameters = {
            key: t if isinstance(t, nn.Parameter) else nn.Parameter(t) for key, t in tensors.items() if t is not of_choice
        }
        self.lora_a, self.lora_b = parameters["lora_a"], parameters["lora_b"]
        self.gate_weight: nn.Parameter | None
        self.gate_bias: nn.Parameter | None
        self.register_parameter("gate_weight", parameters.get("gate_weight"))
        self.register_parameter("gate_bias", parameters.get("gate_bias"))
        self.choice_bias: Tensor | None
        self.load: Tensor | None
        self.register_buffer("choice_bias", of_choice)
        self.register_buffer("load", None if of_choice is None else torch.zeros_like(of_choice), persistent=False)
        self.router_logits: Tensor | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters of experts and gate, by name."""
        return self.options().shapes(self.in_features, self.out_features)

    def reset_parameters(self) -> None:
        """Initialise A like PEFT (Kaiming uniform over I, a = sqrt(5)), the gate's weight normal, everything else zero."""
        initialise(self.mixtures()[_ADAPTER])
        if self.load is not None:
            nn.init.zeros_(self.load)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the frozen layer plus the delta of the experts.

        Args:
            x: (..., I), see `lmoe`.

        Returns:
            y (..., O) in x's dtype.
        """
        if self.router_logits is not None:
            self.router_logits = None  # if this forward fails or keeps none, no loss may use those of an earlier batch
        base = self.frozen_layer
        if self.disabled:
            return base(x)
        if self.training and not torch.compiler.is_compiling():
            self._warn_of_frozen_parameters()
        if self._stacked is not None and (of_group := self.result_of_group(x)) is not None:
            y, self.router_logits = of_group
            return y
        options: dict[str, Any] = {
            "gate_weight": self.gate_weight,
            "gate_bias": self.gate_bias,
            "scaling": self.scaling,
            "mixing": self.mixing,
            "top_k": self.top_k,
            "renormalize": self.renormalize,
            "dropout": self.dropout if self.training else 0.0,
            "backend": self.backend,
            "return_router_logits": self.output_router_logits,
        }
        if self.gate_weight is None:
            options["gate_logits"] = self.logits_of_router(x)
        choice = None
        if self.has_choice_bias:  # no buffer is looked up in the usual layer, which has none
            assert self.choice_bias is not None
            choice = Choice(self.choice_bias, self.load if self.training else None)
        y, router_logits = add_experts(base, x, self.lora_a, self.lora_b, options, choice)
        if router_logits is not None:
            self.router_logits = router_logits
        return y

    def use_router(self, router: Router, layers: int, *, owns: bool) -> None:
        """Take the logits from a router that so many layers share, and have it as a part of this layer if it `owns` it."""
        self._uses = (router, layers)
        self.router = router if owns else None

    def shared_router(self) -> Router | None:
        """The router outside the layer's own gate, if it is connected to one."""
        return None if self._uses is None else self._uses[0]

    def logits_of_router(self, x: Tensor) -> Tensor:
        """The logits (..., E) of the shared router for an input x of this layer."""
        if self._uses is None:
            checks.fail("LMoELinear", "router", f"be connected where it is {self.router_scope!r} (see apply_lmoe)", "none")
        router, layers = self._uses
        return router.logits_for(x, layers)

    def wrapped(self) -> nn.Module:
        """The frozen layer, see `LayerWithExperts`."""
        return self.frozen_layer

    def active(self) -> list[str]:
        """The only mixture of this layer, see `LayerWithExperts`."""
        return [_ADAPTER]

    def mixtures(self) -> dict[str, Mixture]:
        """The only mixture of this layer, see `LayerWithExperts`."""
        return {_ADAPTER: Mixture(self.options(), {key: getattr(self, key) for key in self.shapes()})}

    def gate(self, adapter: str) -> dict[str, Tensor]:
        """The gate of the layer or of the router that it shares, see `LayerWithExperts`."""
        router = self.shared_router()
        return super().gate(adapter) if router is None else dict(router.gate())

    def set_mixture(self, adapter: str, mixture: Mixture) -> None:
        """Replace the experts and the gate of this layer, see `LayerWithExperts`."""
        self._set_options(mixture.config)
        self._set_tensors(mixture.tensors)

    def keep_router_logits(self, adapter: str, keep: bool) -> None:
        """Set the option output_router_logits, see `LayerWithExperts`."""
        self.output_router_logits = keep
        if not keep:
            self.router_logits = None

    def kept_router_logits(self) -> dict[str, Tensor]:
        """The router logits of the last forward, see `LayerWithExperts`."""
        return {} if self.router_logits is None else {_ADAPTER: self.router_logits}

    def loads(self) -> dict[str, Tensor]:
        """The load of the experts if they have a choice_bias, see `LayerWithExperts`."""
        return {} if self.load is None else {_ADAPTER: self.load}

    def _warn_of_frozen_parameters(self) -> None:
        """Warn if PEFT may have frozen the experts: get_peft_model freezes all existing parameters without a warning."""
        router = self.shared_router()
        trained = (self.lora_a, self.lora_b, self.gate_weight if router is None else router.gate_weight)
        frozen = not any(parameter is not None and parameter.requires_grad for parameter in trained)
        if frozen and "peft" in sys.modules and torch.is_grad_enabled():
            warnings.warn(
                "LMoELinear: lora_a, lora_b and gate_weight are frozen in a layer that is in training mode. get_peft_model "
                "freezes all existing parameters: call it before apply_lmoe, or call train_lmoe(model) after it and before "
                "the optimizer is created.",
                stacklevel=3,
            )

    @property
    def num_trainable_parameters(self) -> int:
        """The number of elements of this layer's parameters that require a gradient."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the router logits out of copies, because a tensor with a graph cannot be copied."""
        return {**self.__dict__, "router_logits": None}
