"""Latencies of vLLM's server over HTTP, on the loopback interface."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.serving.rows import LENGTH, ROWS, VOCABULARY, options_of

CLIENTS, PROMPT, TOKENS = 4, 64, 32
LOAD = (
    f"{CLIENTS} clients on the same machine, each with one request after the other: {PROMPT} tokens in, {TOKENS} out."
    " Answers are streamed. The servers take turns. A first token is timed from the request,"
    " another one from the token before it."
)


class Server:
    """A server of a row, with a process group of its own."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        for key, value in options_of(ROWS[name], folder, device).items():
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                command += [flag if value else f"--no-{flag[2:]}"]
            else:
                command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
        self.log = folder / f"{name}-server.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self.model = str(folder / "base")
        self.first: list[float] = []
        self.others: list[float] = []

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until it answers. Raise with the end of its output if it stops or takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    def load(self, seconds: float) -> None:
        """Let the clients send requests for so long, and record the latencies."""
        end = time.monotonic() + seconds
        clients = [threading.Thread(target=self._client, args=(end,)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self, end: float) -> None:
        while time.monotonic() < end:
            self._request()

    def _request(self) -> None:
        body: dict[str, Any] = {
            "model": self.model, "prompt": random.choices(range(2, VOCABULARY), k=PROMPT), "max_tokens": TOKENS,
            "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        times = [time.perf_counter()]
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
        first, *others = (after - before for before, after in pairwise(times))
        self.first.append(first)
        self.others += others

    def close(self) -> None:
        """End the server and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def measure(names: list[str], folder: Path, device: str, seconds: float, turns: int) -> dict[str, dict[str, list[float]]]:
    """The latencies of each row, for so many seconds in all."""
    assert PROMPT + TOKENS <= LENGTH
    servers = {name: Server(name, folder, device) for name in names}
    try:
        for server in servers.values():
            server.wait_until_ready(300)
        for server in servers.values():
            server.load(2)  # the first requests find cold caches
            server.first.clear()
            server.others.clear()
        for _ in range(turns):
            for server in servers.values():
                server.load(seconds / turns / len(servers))
    finally:
        for server in servers.values():
            server.close()
    return {name: {"first token": server.first, "another token": server.others} for name, server in servers.items()}
