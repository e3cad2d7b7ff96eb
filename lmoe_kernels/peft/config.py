# SPDX-License-Identifier: Apache-2.0
"""`LMoEConfig`: the options of an adapter of L-MoE in PEFT."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from lmoe_kernels import checks
from lmoe_kernels.config import LayerConfig
from lmoe_kernels.dispatch import BackendName
from lmoe_kernels.options import Mixing
from lmoe_kernels.peft.registration import peft_type
from lmoe_kernels.peft.saved import DICTIONARIES, Shapes, check_layers, layers_of, read_shapes

_OP = "LMoEConfig"
# The options that a layer and the configuration have under one name, and that decide what the experts compute.
_OF_EXPERTS = ("num_experts", "mixing", "top_k", "renormalize", "shared_a", "gate_bias", "choice_bias", "expert_names")
_NAMES_IN_PEFT = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}


class Saved(NamedTuple):
    """The directory that a configuration was read from, and the shapes of the tensors in it; None if it holds none."""

    directory: Path
    shapes: Shapes | None


@dataclass
class LMoEConfig(PeftConfig):
    """The configuration of an adapter of L-MoE, for `peft.get_peft_model` and the other functions of PEFT.

    The options that `LMoELinear` has too are documented there, those that `peft.LoraConfig` has too in PEFT.

    Args:
        num_experts: E, the number of experts.
        r: R, the rank of each expert.
        lora_alpha: the delta of all experts together is multiplied by lora_alpha / r, like that of a LoRA of PEFT. The gates
            of a token sum to 1, so each expert gets a part of that. None is replaced by the value that makes this factor
            2 * n, where n experts share a token: n is top_k if the gates are renormalised, else num_experts.
        use_rslora: divide lora_alpha by sqrt(r) instead of r.
        mixing: see `lmoe`.
        top_k: see `lmoe`.
        renormalize: see `lmoe`.
        shared_a: see `LMoELinear`.
        gate_bias: see `LMoELinear`.
        choice_bias: see `LMoELinear`.
        expert_names: see `LMoELinear`.
        lora_dropout: the probability of dropout on the input of A, in training; the gate sees the input itself.
        gate_init_std: see `LMoELinear`.
        target_modules: as in `LoraConfig`: names, a regular expression, "all-linear", or None for PEFT's choice for LoRA.
        exclude_modules: as in `LoraConfig`.
        layers_to_transform: as in `LoraConfig`.
        layers_pattern: as in `LoraConfig`.
        rank_pattern: as in `LoraConfig`: other ranks for the layers that match a name or a regular expression.
        alpha_pattern: as in `LoraConfig`.
        modules_to_save: as in `LoraConfig`.
        output_router_logits: whether layers keep their router logits, for `collect_router_logits`. They also do if one of
            the next two is above 0.
        router_aux_loss_coef: weight of the balance loss that the model adds to its loss in training.
        router_z_loss_coef: weight of the router z-loss that the model adds to its loss in training.
        backend: see `lmoe`.

    Raises:
        ValueError: an option does not fit.
        TypeError: an option has the wrong type.

    Example:
        config = LMoEConfig(num_experts=8, r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    """

    num_experts: int = field(default=8, metadata={"help": "The number of experts."})
    r: int = field(default=16, metadata={"help": "The rank of each expert."})
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "The delta is multiplied by lora_alpha / r. None for 2 * r * the number of experts of a token."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Divide lora_alpha by sqrt(r) instead of r."})
    mixing: Mixing = field(
        default="factors", metadata={"help": "'factors' averages the experts' A and B, 'outputs' their products."}
    )
    top_k: int | None = field(default=None, metadata={"help": "How many experts each token keeps; None for all."})
    renormalize: bool = field(default=True, metadata={"help": "Whether the gates of the kept experts sum to 1."})
    shared_a: bool = field(default=False, metadata={"help": "Whether all experts share one A."})
    gate_bias: bool = field(default=False, metadata={"help": "Whether the gate has a bias."})
    choice_bias: bool = field(
        default=False, metadata={"help": "Whether a bias that balances the load takes part in the choice of top_k."}
    )
    expert_names: list[str] | None = field(default=None, metadata={"help": "One name for each expert; None for numbers."})
    lora_dropout: float = field(default=0.0, metadata={"help": "The probability of dropout on the input of A."})
    gate_init_std: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the gate's initial weights; None for 1 / sqrt(in_features)."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the layers, a regular expression or 'all-linear'; None for PEFT's choice for LoRA."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of layers that get no experts, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The numbers of the blocks whose layers get experts; None for all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the list of blocks, with layers_to_transform."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other ranks, by names of layers or regular expressions."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Other values of lora_alpha, by names of layers or regular expressions."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of other modules that are trained and saved, for example a new classifier."}
    )
    output_router_logits: bool = field(default=False, metadata={"help": "Whether layers keep their router logits."})
    router_aux_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the balance loss in the loss of the model."}
    )
    router_z_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the router z-loss in the loss of the model."}
    )
    backend: BackendName | None = field(
        default=None, metadata={"help": "The backend that computes the experts; None to select one automatically."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.saved: Saved | None = None
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            if isinstance(names := getattr(self, name), set | frozenset | tuple):
                setattr(self, name, sorted(names))
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        self.check()
        if self.lora_alpha is None:
            of_lora = self._layer_config(self.r, None).default_alpha()
            self.lora_alpha = of_lora / self.r**0.5 if self.use_rslora else of_lora

    def check(self) -> None:
        """Check every option.

        Raises:
            ValueError: an option does not fit.
            TypeError: an option has the wrong type.
        """
        try:
            self._layer_config(self.r, self.lora_alpha).check()
        except (ValueError, TypeError) as error:
            raise type(error)(_in_names_of_peft(str(error))) from None
        checks.check_bool(_OP, "use_rslora", self.use_rslora)
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            checks.check_finite(_OP, name, getattr(self, name), "be a number of at least 0", at_least=0)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_names(name, getattr(self, name), "be None, a str or several", (str,))
        _check_names("modules_to_save", self.modules_to_save, "be None or several str")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(pattern := getattr(self, name), dict):
                checks.fail(_OP, name, "be a dict", type(pattern).__name__, TypeError)
        for key, rank in self.rank_pattern.items():
            checks.check_positive_int(_OP, f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            checks.check_finite(_OP, f"alpha_pattern[{key!r}]", alpha, "be a finite number")
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Check the options that select some of a model's blocks."""
        numbers = self.layers_to_transform
        several = numbers if isinstance(numbers, list) else [numbers]
        if numbers is not None and not all(isinstance(n, int) and not isinstance(n, bool) for n in several):
            checks.fail(_OP, "layers_to_transform", "be None, an int or a list of them", repr(numbers), TypeError)
        if numbers is not None and isinstance(self.target_modules, str):
            checks.fail(_OP, "layers_to_transform", "be None if target_modules is a str", repr(numbers))
        if self.layers_pattern and numbers is None:
            checks.fail(_OP, "layers_pattern", "be None without layers_to_transform", repr(self.layers_pattern))

    def layer_config(self, name: str) -> LayerConfig:
        """The options of the layer of this name."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.lora_alpha)
        assert alpha is not None
        return self._layer_config(rank, alpha * rank**0.5 if self.use_rslora else alpha)

    def _layer_config(self, rank: int, alpha: float | None) -> LayerConfig:
        """The options of a layer with this rank, whose scaling is alpha / rank."""
        return LayerConfig(
            rank=rank,
            alpha=alpha,
            dropout=self.lora_dropout,
            output_router_logits=self.output_router_logits or any(self.coefficients()),
            **{name: getattr(self, name) for name in (*_OF_EXPERTS, "gate_init_std", "backend")},
        )

    def with_layer(self, name: str, options: LayerConfig) -> "LMoEConfig":
        """A copy of this configuration whose layer of this name has these options of its experts, rank and alpha."""
        changed = replace(self, **{key: getattr(options, key) for key in _OF_EXPERTS})
        changed.expert_names = None if options.expert_names is None else list(options.expert_names)
        same = changed.layer_config(name)
        if options.rank != same.rank or options.alpha != same.alpha:
            assert options.alpha is not None
            alpha = options.alpha / options.rank**0.5 if self.use_rslora else options.alpha
            changed.rank_pattern = {name: options.rank, **changed.rank_pattern}
            changed.alpha_pattern = {name: alpha, **changed.alpha_pattern}
        return changed

    def to_dict(self) -> dict[str, Any]:
        """The options by name, those that PEFT turned into sets as sorted lists."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def coefficients(self) -> tuple[float, float]:
        """The weights of the balance loss and of the router z-loss."""
        return self.router_aux_loss_coef, self.router_z_loss_coef

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of a saved adapter, and check the shapes of its tensors if they are on this machine.

        The configuration remembers its directory: PEFT can load the adapter with it into a model that has its layers alone.
        For a new adapter with the same options, copy it by `dataclasses.replace(config)`.

        Args:
            pretrained_model_name_or_path: the directory, or a name on the Hugging Face hub.
            subfolder: a folder inside it.

        Returns:
            the `LMoEConfig`.

        Raises:
            ValueError: the directory holds no adapter of this type, or its tensors do not fit the configuration.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        op = f"{_OP}.from_pretrained"
        if not isinstance(config, LMoEConfig):
            checks.fail(op, "directory", "hold an adapter of type 'LMOE'", f"one of {config.peft_type!r}")
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if directory.is_dir():
            shapes = read_shapes(op, directory)
            for name, of_layer in layers_of(shapes or {}).items():
                check_layers(op, {name: config._shapes(name, of_layer)}, {name: of_layer}, str(directory))
            config.saved = Saved(directory, shapes)
        return config

    def _shapes(self, name: str, saved: Shapes) -> Shapes:
        """The shapes that the tensors of this layer must have, with the numbers of features that they were saved with."""
        in_features, out_features = ((saved.get(DICTIONARIES[key]) or (0,))[-1] for key in ("lora_a", "lora_b"))
        shapes = self.layer_config(name).shapes(in_features, out_features)
        return {DICTIONARIES[key]: shape for key, shape in shapes.items()}


def _check_names(name: str, names: Any, must: str, also: tuple[type, ...] = ()) -> None:
    if names is None or isinstance(names, also):
        return
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(one, str) for one in names):
        checks.fail(_OP, name, must, repr(names), TypeError)


def _in_names_of_peft(error: str) -> str:
    """An error of `LayerConfig.check`, with the names that the options have here."""
    argument = error.removeprefix("LMoELinear: ").partition(" ")[0]
    return error.replace(f"LMoELinear: {argument}", f"{_OP}: {_NAMES_IN_PEFT.get(argument, argument)}", 1)
