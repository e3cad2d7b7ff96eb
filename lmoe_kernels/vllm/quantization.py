# SPDX-License-Identifier: Apache-2.0
"""The quantization method "lmoe" of vLLM: it gives the layers that adapters name a method that adds their experts."""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from lmoe_kernels.checks import fail
from lmoe_kernels.reader import saved_layers
from lmoe_kernels.version import __version__
from lmoe_kernels.vllm import layouts
from lmoe_kernels.vllm.adapters import TokenChoices, check_setup, install
from lmoe_kernels.vllm.layouts import OP, ServedAdapter
from lmoe_kernels.vllm.linear import LMoELinearMethod, why_not_served

logger = init_logger("vllm.lmoe_kernels")  # vLLM shows what is logged under its own name


class LMoEConfig(QuantizationConfig):
    """The adapters of a server, around the quantization of the base model. It is pickled into the worker processes.

    Attributes:
        base: the quantization of the base model, or None.
        adapters: what is served.
        directories: those among which requests choose by a LoRARequest; empty if all tokens get the one adapter.
        tokens: which adapter each token gets, and its scale; None if all tokens get the one adapter, or before the model.
        keeps_router_logits: whether the layers keep the router logits of each step, for `record_routing`.
        served: the names of the modules, in the plain model, that layers of vLLM's model have got experts for.
    """

    def __init__(self, base: QuantizationConfig | None = None) -> None:
        super().__init__()
        self.base = base
        self.adapters: list[ServedAdapter] = []
        self.directories: tuple[str, ...] = ()
        self.tokens: TokenChoices | None = None
        self.keeps_router_logits = False
        self.served: set[str] = set()
        self.explained: set[object] = set()  # the kinds of layers that were logged
        self._names: dict[str, str] = {}  # names in the plain model by those in vLLM's
        self._waiting: set[str] = set()  # layers that have not been filled
        self._tensors: list[dict[str, dict[str, Tensor]]] = []  # of the adapters, while layers wait

    def get_name(self) -> str:
        """The name of the method."""
        return "lmoe"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of x: those of the base."""
        return [torch.bfloat16, torch.float16, torch.float32] if self.base is None else self.base.get_supported_act_dtypes()

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest NVIDIA architecture: Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file of the base model belongs to this method."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LMoEConfig":
        """Wrap the quantization of a base model, of whose configuration this is the entry."""
        for name in QUANTIZATION_METHODS:
            if name != "lmoe" and (found := get_quantization_config(name).override_quantization_method(config, None)):
                return cls(get_quantization_config(found).from_config(config))
        return cls(get_quantization_config(config["quant_method"]).from_config(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take the place of the base's method if the user asks for this one."""
        return "lmoe" if user_quant == "lmoe" else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read which layers the adapters have, and refuse what cannot be served, before the model is created."""
        if getattr(self, "online_quantization_config", None) is not None:  # vLLM 0.23 has no such attribute
            fail(
                OP, "quantization_config", "be None: experts are added to the layers of a checkpoint", "online quantization"
            )
        if self.base is not None:
            self.base.maybe_update_config(model_name, hf_config=hf_config, revision=revision)
        directories = layouts.adapter_directories(hf_config)
        self.adapters = [layouts.served_adapter(name, directory) for name, directory in directories.items()]
        self._names = {name: name for adapter in self.adapters for name in adapter.layers}
        self.keeps_router_logits = layouts.keeps_router_logits(hf_config)
        if layouts.SEVERAL in layouts.entries_of(hf_config):
            self.directories = tuple(directories.values())
            install()
        # The options are constants of compiled graphs, which vLLM keeps on the disk under a hash of hf_config.
        hf_config.lmoe_digest = [__version__, *(adapter.digest for adapter in self.adapters)]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Translate the names of the plain model to those of vLLM's."""
        self._names = {hf_to_vllm_mapper.map_name(name) or name: plain for name, plain in self._names.items()}
        if self.base is not None:
            self.base.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The base's method, with experts if an adapter names the layer or one of its modules."""
        if self.directories and self.tokens is None:
            self._prepare_choices()
        base = self._method_of_base(layer, prefix)
        if not isinstance(layer, linear.LinearBase) or base is None:
            return base
        is_qkv = isinstance(layer, linear.QKVParallelLinear)
        modules = layouts.modules_of(prefix, self.packed_modules_mapping, is_qkv)
        plain = [(self._names.get(name), shard) for name, shard in modules]
        names = {name for name, _ in plain if name is not None}
        if not names:
            return base
        if reason := why_not_served(layer, prefix):
            fail(OP, f"layer {next(iter(names))!r}", "be one that vLLM computes as a linear layer", reason)
        self.served |= names
        self._waiting.add(prefix)
        return LMoELinearMethod(base, plain, prefix, self)

    def _prepare_choices(self) -> None:
        """Create the choices in the process that runs the model, where vLLM asks for a manager of adapters afterwards."""
        install()
        current = get_current_vllm_config()
        check_setup(current)
        if (most := current.lora_config.max_loras) < len(self.directories):
            logger.warning(
                "lmoe: a batch holds requests of %d of %d adapters; --max-loras sets it", most, len(self.directories)
            )
        ranks = current.parallel_config.tensor_parallel_size  # vLLM may pad a batch to a multiple of it
        self.tokens = TokenChoices(current.scheduler_config.max_num_batched_tokens + ranks, self.directories)

    def _method_of_base(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if self.base is None:
            return linear.UnquantizedLinearMethod() if isinstance(layer, linear.LinearBase) else None
        self.base.packed_modules_mapping = self.packed_modules_mapping
        return self.base.get_quant_method(layer, prefix)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Map the names of experts in training. vLLM calls this when the model exists, before it reads weights."""
        self.check_served()
        experts = WeightsMapper(orig_to_new_regex={layouts.stream_pattern(self.adapters): r"\1.lmoe.\2"})
        return experts if self.base is None else self.base.get_checkpoint_weight_mapper() | experts

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """As for the base."""
        return super().get_cache_scale_mapper() if self.base is None else self.base.get_cache_scale_mapper()

    def check_served(self) -> None:
        """Check that the model has every layer of the adapters.

        Raises:
            ValueError: it does not have one.
        """
        blocks = None
        current = get_current_vllm_config_or_none()
        if get_pp_group().world_size > 1 and current is not None:
            of_model = current.model_config.hf_text_config.num_hidden_layers
            blocks = range(*get_pp_indices(of_model, get_pp_group().rank_in_group, get_pp_group().world_size))
        if (name := layouts.unserved(self.adapters, self.served, blocks)) is not None:
            fail(OP, f"layer {name!r} of an adapter", "be a linear layer of the model in vLLM", "none of that name")

    def tensors_for(self, prefix: str) -> list[dict[str, dict[str, Tensor]]]:
        """The tensors of each adapter by layer and name. They are dropped when the last layer has asked.

        Raises:
            ValueError: an adapter has other options than when the server was started.
        """
        tensors = self._tensors or [self._read(adapter) for adapter in self.adapters]
        self._waiting.discard(prefix)
        self._tensors = tensors if self._waiting else []
        return tensors

    def load(self, model: nn.Module, adapter: int, directory: str | None = None) -> None:
        """Fill the experts of an adapter from a directory, by default its own. An error leaves them as they are.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the directory holds other layers, options or shapes than those that are served.
        """
        tensors = self._read(self.adapters[adapter], directory)
        for layer, method in layouts.layers_with_experts(model):
            method.fill(layer, adapter, tensors)

    def _read(self, adapter: ServedAdapter, directory: str | None = None) -> dict[str, dict[str, Tensor]]:
        directory = adapter.directory if directory is None else directory
        saved = saved_layers(OP, directory)
        if saved.digest != adapter.digest:
            fail(OP, directory, "hold the layers, options and shapes with which the server was started", "others")
        return layouts.tensors_to_serve(saved)


def refuse_adapters_without_method() -> None:
    """Let vLLM refuse an adapter if another method or none was asked for: it would serve the base model alone."""
    create_of_vllm = EngineArgs.create_model_config

    @wraps(create_of_vllm)
    def create_model_config(self: EngineArgs) -> Any:
        created = create_of_vllm(self)
        entries = layouts.entries_of(created.hf_config)
        if entries and created.quantization != "lmoe":
            fail(OP, "quantization", f"be 'lmoe' with {entries[0]} in --hf-overrides", repr(created.quantization))
        return created

    EngineArgs.create_model_config = create_model_config
