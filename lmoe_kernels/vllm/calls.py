# SPDX-License-Identifier: Apache-2.0
"""Calls of `WorkerExtension` from the process that has an engine."""
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

from lmoe_kernels.checks import fail
from lmoe_kernels.vllm.layouts import ServedAdapter
from lmoe_kernels.vllm.worker import WorkerExtension

_EXTENSION = "lmoe_kernels.vllm.WorkerExtension"


def on_workers(op: str, llm: Any, method: Callable[..., None], *args: Any) -> None:
    """Call a method of `WorkerExtension` in every worker.

    An engine in this process takes the function. One in another process would have to unpickle it, so that its workers must
    have the method already.

    Raises:
        ValueError: they do not have it.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.engine.core_client import InprocClient

    if isinstance(llm.llm_engine.engine_core, InprocClient):
        llm.collective_rpc(method, args=args)
        return
    extension = llm.llm_engine.vllm_config.parallel_config.worker_extension_cls
    if not extension or not issubclass(resolve_obj_by_qualname(extension), WorkerExtension):
        must = (
            f"be created with worker_extension_cls={_EXTENSION!r}, or run in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)"
        )
        fail(op, "llm", must, f"worker_extension_cls={extension!r}")
    llm.collective_rpc(method.__name__, args=args)


def adapters_of(op: str, llm: Any) -> list[ServedAdapter]:
    """The adapters that an engine serves.

    Raises:
        ValueError: it serves none, or a request is in progress.
        TypeError: it is no engine whose calls return when they are done.
    """
    engine = getattr(llm, "llm_engine", None)
    if engine is None:
        fail(op, "llm", "be a vllm.LLM (a server takes the calls of WorkerExtension)", type(llm).__name__, TypeError)
    config = engine.vllm_config.quant_config
    if getattr(config, "adapters", None) is None:
        fail(op, "llm", "be created with quantization='lmoe'", "another quantization or none")
    if engine.has_unfinished_requests():
        fail(op, "llm", "have no request in progress", "one or more")
    return config.adapters
