# SPDX-License-Identifier: Apache-2.0
"""New experts and gates for an engine of vLLM that runs, from a model in training."""

from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lmoe_kernels import checks
from lmoe_kernels.adapter import Adapter, write_adapter
from lmoe_kernels.contents import adapter_of
from lmoe_kernels.naming import plain_key
from lmoe_kernels.vllm.calls import adapters_of, on_workers
from lmoe_kernels.vllm.layouts import ONE, ServedAdapter, ServedLayer
from lmoe_kernels.vllm.worker import WorkerExtension

_OP = "sync_weights"


def sync_weights(llm: Any, weights: nn.Module | Mapping[str, Tensor], *, adapter: str = ONE) -> None:
    """Replace the experts and gates that vLLM serves by those of a model in training, and reset vLLM's prefix cache.

    The cache holds keys and values that the old experts computed: without the reset, a prompt that was seen before would
    get other tokens than the new experts give. Everything is checked before the first change. The tensors pass to the
    workers in a file in Python's temporary folder; the workers must run on this machine.

    Args:
        llm: a `vllm.LLM` with quantization="lmoe", without a request in progress. If its engine runs in another process, it
            needs `worker_extension_cls="lmoe_kernels.vllm.WorkerExtension"`.
        weights: a model with L-MoE layers, plain or wrapped; or all of its tensors of experts and gates, by their names in
            the plain model. If the model is sharded (FSDP), gather the tensors first, and call this on one process.
        adapter: which one, if several are served: its name in `lmoe_adapters`.

    Raises:
        ValueError: a layer or tensor is missing, unknown or has another shape, layers have other options, no adapter has
            this name, or a request is in progress. Nothing has changed.
        TypeError: `llm` or `weights` has the wrong type.

    Example:
        trainer.train()
        sync_weights(llm, trainer.model)

    Source: L-MoE, arXiv 2510.17898.
    """
    served = {one.name: one for one in adapters_of(_OP, llm)}
    if adapter not in served:
        _fail("adapter", f"be one of {', '.join(map(repr, served))}", repr(adapter))
    tensors = _checked(weights, served[adapter])
    options = {name: layer.config.stored() for name, layer in served[adapter].layers.items()}
    if not llm.reset_prefix_cache():  # first: if it fails, the old experts still fit the cache
        _fail("llm", "have no request in progress", "blocks of its cache in use")
    with TemporaryDirectory(prefix="lmoe-") as directory:
        write_adapter(directory, Adapter(options, tensors, [], ""))
        on_workers(_OP, llm, WorkerExtension.load_lmoe, directory, adapter)


def _checked(weights: nn.Module | Mapping[str, Tensor], served: ServedAdapter) -> dict[str, Tensor]:
    """The tensors by their names in the plain model, if they are those of the adapter that is served."""
    if isinstance(weights, nn.Module):
        adapter = adapter_of(_OP, weights)
        if adapter.modules_to_save:
            _fail("weights", "train experts and gates alone", f"modules_to_save {adapter.modules_to_save}")
        for name, layer in served.layers.items():
            options = adapter.layers.get(name)
            if options is not None and (got := _difference(options, layer)):
                _fail(f"layer {name!r}", "have the options that vLLM serves", got)
        tensors: Mapping[str, Tensor] = adapter.tensors
    elif isinstance(weights, Mapping) and all(isinstance(tensor, Tensor) for tensor in weights.values()):
        tensors = {plain_key(key): tensor for key, tensor in weights.items()}
    else:
        got = type(weights).__name__
        checks.fail(_OP, "weights", "be a model, or a mapping of names to tensors", got, TypeError)
    expected = _shapes(served)
    for key in tensors:
        if key not in expected:
            _fail("weights", "hold experts and gates of the adapter that vLLM serves alone", repr(key))
    for key, shape in expected.items():
        if key not in tensors:
            _fail("weights", f"hold {key!r}", "none of that name")
        if tuple(tensors[key].shape) != shape:
            _fail(f"tensor {key!r}", f"have shape {shape}", tuple(tensors[key].shape))
        if tensors[key].dtype not in checks.DTYPES or tensors[key].is_meta:
            got = "one on the meta device" if tensors[key].is_meta else tensors[key].dtype
            _fail(f"tensor {key!r}", f"have data in one of the dtypes {', '.join(map(str, checks.DTYPES))}", got)
    # Copies: the tensors may be parts of one buffer, which a safetensors file does not take.
    return {key: tensors[key].detach().cpu().clone(memory_format=torch.contiguous_format) for key in expected}


def _difference(options: Mapping[str, Any], layer: ServedLayer) -> str | None:
    """The first option in which a layer differs from the one that is served."""
    for key, of_served in layer.config.stored().items():
        if options[key] != of_served:
            return f"{key}={options[key]!r} in place of {of_served!r}"
    return None


def _shapes(served: ServedAdapter) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of an adapter by their names in training."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in served.layers.items():
        own = layer.config.shapes(layer.in_features, layer.out_features)
        shapes |= {f"{name}.{key}": shape for key, shape in own.items()}
        if layer.gate == name and not layer.config.own_gate:  # the first of the layers that share a router
            shapes |= {f"{name}.router.{key}": shape for key, shape in layer.shapes.items() if key.startswith("gate_")}
    return shapes


def _fail(argument: str, must: str, got: object) -> NoReturn:
    checks.fail(_OP, argument, must, got)
