# SPDX-License-Identifier: Apache-2.0
"""Mixtures of LoRA experts in vLLM: a quantization method named "lmoe", which wraps the method of the base model.

    vllm serve BASE --quantization lmoe --hf-overrides '{"lmoe_adapter": "DIR"}'

DIR is a directory that `save_lmoe` wrote. Every linear layer that the adapter names gets the experts as a child module.
This package imports vLLM only when vLLM calls `register`, its plugin of the group `vllm.general_plugins`, or when a function
gets an engine.
"""
# pyright: reportMissingImports=false

from lmoe_kernels.vllm.replay import replay_routing
from lmoe_kernels.vllm.routing import Routing, record_routing
from lmoe_kernels.vllm.sync import sync_weights
from lmoe_kernels.vllm.worker import WorkerExtension

__all__ = ["Routing", "WorkerExtension", "record_routing", "register", "replay_routing", "sync_weights"]


def register() -> None:
    """Register the quantization method "lmoe", and refuse adapters without it.

    vLLM calls it in each of its processes, perhaps more than once.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader.reload.meta import SKIP_MODULES

    from lmoe_kernels.vllm.linear import LMoEExperts
    from lmoe_kernels.vllm.quantization import LMoEConfig, refuse_adapters_without_method

    register_quantization_config("lmoe")(LMoEConfig)
    refuse_adapters_without_method()
    SKIP_MODULES.add(LMoEExperts.__name__)
