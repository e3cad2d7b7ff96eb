"""Tests on two processes, which torch.distributed connects by gloo."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

PRELOADED = ["transformers.trainer", "torch.distributed.fsdp", "lmoe_kernels.peft"]  # what takes longest to import


def on_two_processes(act: Callable[..., None], *args: Any) -> None:
    """Run act(rank, *args) on two processes with one seed; an error in one of them is raised here.

    `act` must be a function of a module. It creates the process group, or a Trainer does that for it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)  # a process imports them once, and the two are its forks
    torch.multiprocessing.start_processes(_run, (port, act, args), nprocs=2, start_method="forkserver")


def _run(rank: int, port: int, act: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)
    }  # fmt: skip
    torch.manual_seed(port)
    act(rank, *args)
    torch.distributed.destroy_process_group()
