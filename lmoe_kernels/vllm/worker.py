# SPDX-License-Identifier: Apache-2.0
"""What runs inside vLLM's worker processes: new experts are loaded there, and router logits are recorded.

Tensors pass between processes as safetensors files, since vLLM would pickle them otherwise.
"""
# pyright: reportMissingImports=false

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmoe_kernels.checks import fail
from lmoe_kernels.files import safetensors
from lmoe_kernels.options import places_of
from lmoe_kernels.vllm import layouts
from lmoe_kernels.vllm.layouts import Member

REQUEST, POSITION, ADAPTER = "request", "position", "adapter"  # of a row of router logits; all others are named by layers


class WorkerExtension:
    """The methods that vLLM's workers need for `sync_weights` and `record_routing` if they run in other processes.

    Example:
        LLM(base, quantization="lmoe", worker_extension_cls="lmoe_kernels.vllm.WorkerExtension", ...)
    """

    model_runner: Any
    rank: int

    def load_lmoe(self, directory: str, adapter: str = layouts.ONE) -> None:
        """Replace the experts and gates of an adapter by those that `save_lmoe` wrote to a directory.

        Args:
            directory: where they are.
            adapter: its name in lmoe_adapters; without several adapters there is one.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: no adapter has this name, or the directory holds other layers, options or shapes. Nothing changes.
        """
        config = self.model_runner.vllm_config.quant_config
        names = [served.name for served in config.adapters]
        if adapter not in names:
            fail("load_lmoe", "adapter", f"be one of {', '.join(map(repr, names))}", repr(adapter))
        config.load(self.model_runner.model, names.index(adapter), directory)

    def start_routing(self) -> None:
        """Record the router logits of every token from now on.

        Raises:
            ValueError: this setup of vLLM cannot be recorded.
        """
        _check_recordable(self.model_runner.vllm_config)
        if "execute_model" in vars(self.model_runner):
            fail("record_routing", "llm", "be recorded once at a time", "a second recording")
        recorder = _Recorder(self.model_runner)
        self.model_runner.execute_model = recorder

    def stop_routing(self, directory: str | None) -> None:
        """Stop, and write what was recorded to a file of the directory unless it is None."""
        recorder = vars(self.model_runner).pop("execute_model")
        if directory is not None:
            recorder.write(Path(directory, f"{self.rank}.safetensors"))


class _Rows(NamedTuple):
    """The tokens of one step."""

    requests: list[str]  # the id of each
    positions: list[int]
    adapters: Tensor  # (T): the index of the adapter that each got, or -1
    logits: dict[str, Tensor]  # (T, E) by adapter and layer


class _Recorder:
    """Takes the place of the model runner's `execute_model` and reads the router logits that the layers kept after it."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._execute_model = runner, runner.execute_model
        self._steps: list[_Rows] = []
        self._blocks = list(_kept_logits(runner.model))

    def __call__(self, scheduler_output: Any, *args: Any, **keywords: Any) -> Any:
        result = self._execute_model(scheduler_output, *args, **keywords)
        if scheduler_output.total_num_scheduled_tokens:
            self._steps.append(self._rows(scheduler_output))
        return result

    def _rows(self, step: Any) -> _Rows:
        known = step.scheduled_cached_reqs
        starts = dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        requests: list[str] = []
        positions: list[int] = []
        for request in self._runner.input_batch.req_ids:  # the order of the tokens in the batch
            count = step.num_scheduled_tokens.get(request, 0)
            requests += [request] * count
            positions += range(starts[request], starts[request] + count) if count else ()
        tokens = self._runner.vllm_config.quant_config.tokens
        total = len(requests)
        adapters = torch.zeros(total, dtype=torch.int32) if tokens is None else _copied(tokens.group[:total])
        return _Rows(requests, positions, adapters, {name: _copied(take()[:total]) for name, take in self._blocks})

    def write(self, path: Path) -> None:
        """Write all rows, one after the other, with the ids of the requests in the metadata."""
        ids = list(dict.fromkeys(request for step in self._steps for request in step.requests))
        number = {request: i for i, request in enumerate(ids)}
        tensors = {
            REQUEST: torch.tensor([number[request] for step in self._steps for request in step.requests]),
            POSITION: torch.tensor([position for step in self._steps for position in step.positions]),
            ADAPTER: torch.cat([torch.zeros(0, dtype=torch.int32), *(step.adapters for step in self._steps)]),
        }
        for name, _ in self._blocks if self._steps else ():
            tensors[name] = torch.cat([step.logits[name] for step in self._steps])
        safetensors("record_routing").save_file(tensors, path, metadata={"requests": json.dumps(ids)})


def _copied(rows: Tensor) -> Tensor:
    """A copy on the CPU, also of a tensor on the CPU: the next step writes to the same memory."""
    return rows.to("cpu", copy=True)


def _kept_logits(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The adapter's index and the layer's name of each mixture, and a function that reads its kept logits."""
    for layer, method in layouts.layers_with_experts(model):
        experts: Any = layer.lmoe
        for member, place in zip(method.members, places_of(experts.blocks), strict=True):
            yield key_of(member), lambda experts=experts, place=place: experts.router_logits[:, place.experts]


def key_of(member: Member) -> str:
    """The name of a mixture in a file of router logits."""
    return f"{member.adapter}.{member.name}"


def _check_recordable(vllm_config: Any) -> None:
    from vllm.distributed import get_pp_group

    of, got = "record_routing", None
    if not vllm_config.quant_config.keeps_router_logits:
        fail(of, "llm", f"be created with hf_overrides that say {{{layouts.ROUTER_LOGITS!r}: True}}", "none")
    if vllm_config.use_v2_model_runner:
        fail(of, "llm", "use vLLM's first model runner (VLLM_USE_V2_MODEL_RUNNER=0)", "the second")
    if vllm_config.cache_config.enable_prefix_caching:
        got = "enable_prefix_caching: cached tokens pass no router"
    elif vllm_config.speculative_config is not None:
        got = "speculative decoding"
    elif vllm_config.parallel_config.use_ubatching or get_pp_group().world_size > 1:
        got = "micro-batches or pipeline parallelism"
    if got is not None:
        fail(of, "llm", "compute each token of a request once, in one forward of the whole model", got)
