# SPDX-License-Identifier: Apache-2.0
"""`LMoEModel`: puts the layers of the tuner into a model, for PEFT's functions on whole models."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from torch import Tensor, nn

from lmoe_kernels import auxiliary_hook, checks
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.linears import weight_of
from lmoe_kernels.peft.config import LMoEConfig
from lmoe_kernels.peft.layer import NO_SINGLE_WEIGHT, LMoETunerLinear
from lmoe_kernels.peft.saved import DICTIONARIES, WEIGHTS, LayerShapes, check_layers, check_shapes, layers_of
from lmoe_kernels.targets import BYPASS_THEIR_LAYERS

_OP = "LMoEModel"


class LMoEModel(BaseTuner):
    """The tuner that `peft.get_peft_model` creates for a `LMoEConfig`. An error leaves the model unchanged."""

    prefix = "lmoe_"
    tuner_layer_cls = LMoETunerLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    peft_config: dict[str, LMoEConfig]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. Older versions of PEFT call its `forward`, which skips the hook that adds the auxiliary losses."""
        return self.model(*args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model. PEFT calls this for each new adapter, in every way to add one."""
        config = self.peft_config[adapter_name]
        try:
            config.check()  # again, because the options may have been changed since the configuration was made
            with _unchanged_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
                if not _layers(model, adapter_name):  # PEFT 0.18 does not check this for a second adapter
                    checks.fail(_OP, "target_modules", "match layers of the model", repr(config.target_modules))
                _check_saved(model, adapter_name, config)
                if state_dict is not None:
                    _check_state(_OP, model, adapter_name, state_dict)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        if any(config.coefficients()):
            auxiliary_hook.install(model, _Coefficients(model))
        if config.top_k == 1 and config.renormalize and config.num_experts > 1 and not any(config.coefficients()):
            warnings.warn(
                "LMoEConfig: top_k=1 with renormalize=True: the kept gate is always 1, so the language-modelling loss does "
                "not train the gate; pass renormalize=False or router_aux_loss_coef",
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Give a layer the experts of an adapter."""
        if isinstance(parent, LMoELinear):
            checks.fail(_OP, "target_modules", "name layers without experts", f"{current_key!r} with those of apply_lmoe")
        if isinstance(parent, BYPASS_THEIR_LAYERS):
            got = f"{current_key!r}, whose weight {type(parent).__name__} uses directly (see exclude_modules)"
            checks.fail(_OP, "target_modules", "name layers that are called", got)
        if isinstance(target, LMoETunerLinear):
            target.update_layer(adapter_name, peft_config.layer_config(current_key))
            return
        layer = LMoETunerLinear(target, current_key, self.peft_config)
        layer.update_layer(adapter_name, peft_config.layer_config(current_key))
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter to fp32, or without PEFT's autocast_adapter_dtype to the dtype of each base layer."""
        for layer in _layers(self.model, adapter_name).values():
            dtype = weight_of(layer.base_layer).dtype
            if autocast_adapter_dtype:
                layer.cast(adapter_name, None)
            elif dtype in checks.DTYPES:
                layer.cast(adapter_name, dtype)

    def _check_merge_allowed(self) -> NoReturn:
        """Raise ValueError. PEFT calls this before it merges an adapter into the model."""
        checks.fail("merge", "the adapter", "have one weight for all tokens", NO_SINGLE_WEIGHT)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Refuse adapter_names, one adapter for each sequence. PEFT would ignore it without this method."""
        if adapter_names is not None:
            must = "be None: call the model once for the sequences of each adapter, after set_adapter"
            checks.fail(_OP, "adapter_names", must, type(adapter_names).__name__)
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors that will be loaded. PEFT calls this from 0.21 on."""
        _check_state("load_adapter", model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class _Coefficients:
    """The weights of the auxiliary losses of a model's adapters. Unlike a nested function, it can be copied and pickled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, adapter: str) -> tuple[float, float]:
        config = getattr(self.model, "peft_config", {}).get(adapter)  # PEFT sets this attribute, and removes it in unload()
        return config.coefficients() if isinstance(config, LMoEConfig) else (0.0, 0.0)


def _layers(model: nn.Module, adapter: str) -> dict[str, LMoETunerLinear]:
    """The layers that have experts of an adapter, by their names in the model that PEFT put them into."""
    tuner = getattr(model, "base_model", None)
    inner = tuner.model if isinstance(tuner, LMoEModel) else model  # a PeftModel, or the model itself
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, LMoETunerLinear)}
    return {name.removeprefix("_orig_mod."): layer for name, layer in layers.items() if adapter in layer.lmoe_options}


def _shapes(model: nn.Module, adapter: str) -> LayerShapes:
    """The shapes of the tensors of an adapter, by layer."""
    layers = {name: layer.mixtures()[adapter].tensors for name, layer in _layers(model, adapter).items()}
    return {name: {DICTIONARIES[k]: tuple(t.shape) for k, t in tensors.items()} for name, tensors in layers.items()}


def _check_state(op: str, model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> None:
    """Check that a state dict holds the tensors of an adapter, and no others of layers with experts."""
    saved = layers_of({key: tensor.shape for key, tensor in state_dict.items()})
    check_layers(op, _shapes(model, adapter), saved, "the state dict")


def _check_saved(model: nn.Module, adapter: str, config: LMoEConfig) -> None:
    """Check that the adapter that the configuration was read from fits the model."""
    if config.saved is None:
        return
    directory, saved = config.saved
    if saved is None:
        checks.fail(_OP, str(directory), f"hold {WEIGHTS}", "its configuration alone")
    if getattr(model, "_checkpoint_conversion_mapping", None):
        return  # PEFT renames the layers of the saved adapter
    check_layers(_OP, _shapes(model, adapter), layers_of(saved), str(directory))
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            state = module.modules_to_save[adapter].state_dict()
            expected = {f"base_model.model.{name}.{key}": tuple(tensor.shape) for key, tensor in state.items()}
            check_shapes(_OP, expected, saved, str(directory))


@contextmanager
def _unchanged_on_error(model: nn.Module, adapter: str) -> Iterator[None]:
    """Undo what PEFT did to a model if it raises an error while it adds an adapter."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, LMoETunerLinear)]
    active = [(layer, layer._active_adapter) for layer in layers]
    try:
        yield
    except BaseException:
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for layer, adapters in active:
            if adapter in layer.lmoe_options:
                layer.delete_adapter(adapter)
            layer._active_adapter = adapters
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
