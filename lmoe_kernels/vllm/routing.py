# SPDX-License-Identifier: Apache-2.0
"""The router logits of vLLM's tokens, so that training can use the experts that the rollout used."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lmoe_kernels.checks import fail
from lmoe_kernels.files import read_tensors
from lmoe_kernels.vllm.calls import adapters_of, on_workers
from lmoe_kernels.vllm.worker import ADAPTER, POSITION, REQUEST, WorkerExtension

_OP = "record_routing"


class Routing:
    """What `record_routing` recorded: one row of router logits for each token that passed the model."""

    def __init__(self) -> None:
        self._requests: dict[str, int] = {}  # by the ids of the engine, without what it appends to them
        self._rows: dict[str, Tensor] = {}

    def of(self, output: Any) -> list[dict[str, Tensor]]:
        """The router logits of a request.

        Args:
            output: what `generate` returned for it, a `vllm.RequestOutput`.

        Returns:
            for each of its completions the logits (tokens, E) in fp32, with the gate's bias, by the name of the layer. The
            tokens are those of the prompt and of the completion but the last, which did not pass the model. A request
            without an adapter has none.

        Raises:
            ValueError: a token passed the model while nothing was recorded.
        """
        prompt, several = len(output.prompt_token_ids), len(output.outputs) > 1
        return [
            self._of(f"{one.index}_{output.request_id}" if several else output.request_id, prompt + len(one.token_ids) - 1)
            for one in output.outputs
        ]

    def _of(self, request: str, tokens: int) -> dict[str, Tensor]:
        number = self._requests.get(request)
        rows = torch.empty(0, dtype=torch.int64) if number is None else (self._rows[REQUEST] == number).nonzero().flatten()
        row_of = torch.full((tokens,), -1)
        # The positions of tokens that vLLM generated and dropped lie beyond. A later row of a position replaces an earlier.
        for row, position in zip(rows.tolist(), self._rows[POSITION][rows].tolist() if len(rows) else [], strict=True):
            if position < tokens:
                row_of[position] = row
        if (row_of < 0).any():
            missing = f"no logits of token {int((row_of < 0).nonzero()[0])} of request {request!r}"
            fail("Routing.of", "output", "be of a request that was computed while the routing was recorded", missing)
        adapter = int(self._rows[ADAPTER][row_of[0]])
        own = {key: key.removeprefix(f"{adapter}.") for key in self._rows if key.startswith(f"{adapter}.")}
        return {name: self._rows[key][row_of] for key, name in own.items()}

    def _read(self, directory: Path) -> None:
        paths = sorted(directory.iterdir())
        self._rows, metadata = read_tensors(_OP, paths[0])  # every rank of tensor parallelism has the same logits
        ids = json.loads(metadata["requests"])
        self._requests = {request.rpartition("-")[0] or request: number for number, request in enumerate(ids)}


@contextmanager
def record_routing(llm: Any) -> Iterator[Routing]:
    """Record the router logits of all tokens that vLLM computes in a `with` block.

    Works eager and compiled. The logits of every step are copied to the CPU, which costs time and, for each token, 4 bytes
    an expert and layer. Limits: enable_prefix_caching=False, because cached tokens pass no router; no speculative decoding
    and no pipeline parallelism; vLLM's first model runner (VLLM_USE_V2_MODEL_RUNNER=0 where it would take the second).

    Args:
        llm: a `vllm.LLM` with quantization="lmoe" and `hf_overrides={"lmoe_adapter": ..., "lmoe_router_logits": True}`,
            without a request in progress. If its engine runs in another process, it needs
            `worker_extension_cls="lmoe_kernels.vllm.WorkerExtension"`.

    Returns:
        a `Routing`, which can be read when the block has ended.

    Raises:
        ValueError: the engine cannot be recorded, or a request is in progress.
        TypeError: `llm` is not a `vllm.LLM`.

    Example:
        with record_routing(llm) as routing:
            outputs = llm.generate(prompts, params)
        with replay_routing(model, [routing.of(output)[0] for output in outputs]):
            logits = model(batch).logits

    Source: L-MoE, arXiv 2510.17898.
    """
    adapters_of(_OP, llm)
    on_workers(_OP, llm, WorkerExtension.start_routing)
    routing = Routing()
    try:
        yield routing
    except BaseException:
        on_workers(_OP, llm, WorkerExtension.stop_routing, None)
        raise
    with TemporaryDirectory(prefix="lmoe-") as directory:
        on_workers(_OP, llm, WorkerExtension.stop_routing, directory)
        routing._read(Path(directory))
