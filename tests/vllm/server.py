"""vLLM's OpenAI-compatible server as a process of its own, on a free port of the loopback interface."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.vllm.tiny import LENGTH, Generated

ROOT = Path(__file__).parents[2]
BASE_NAME = "base"  # the name of the base model in requests


class Server:
    """A server that runs until the end of a `with` block. Its output is in a file.

    Args:
        base: the directory of the model.
        overrides: hf_overrides, which name the adapter.
        log: the file for its output.
        arguments: further arguments.
        environment: further environment variables.
    """

    def __init__(
        self, base: Path, overrides: dict[str, Any], log: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--quantization", "lmoe"),
            *("--hf-overrides", json.dumps(overrides), "--served-model-name", BASE_NAME, "--host", "127.0.0.1"),
            *("--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH)),
            *("--max-num-batched-tokens", str(LENGTH), "--max-num-seqs", "16", *arguments),
        ]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        with log.open("wb") as output:  # a session of its own: what it starts ends with it
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the server and to every process that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def wait_until_ready(self, seconds: float = 420) -> "Server":
        """Wait until it answers. Raise with the end of its output if it stops instead."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self.process.wait(0.2)
            except subprocess.TimeoutExpired:
                if self.get("/health") == 200:
                    return self
            else:
                break
        raise AssertionError(f"the server is not ready:\n{self.output()[-3000:]}")

    def wait_until_it_computes(self, requests: int, seconds: float = 60) -> None:
        """Wait until so many requests are in progress."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                counts = re.findall(r"^vllm:num_requests_running\S* ([\d.]+)$", answer.read().decode(), re.MULTILINE)
            if sum(map(float, counts)) >= requests:
                return
        raise AssertionError(f"{requests} requests are not in progress")

    def output_at_its_end(self, seconds: float = 420) -> str:
        """Wait until a server that cannot start has stopped, and return its output."""
        assert self.process.wait(seconds) != 0
        return self.output()

    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> int | None:
        """The status of a GET request, or None without a connection."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the JSON or text of a POST request. Raises OSError if the connection breaks."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def complete(self, prompts: Sequence[list[int]], count: int = 16, model: str = BASE_NAME) -> list[Generated]:
        """Complete prompts greedily in one request."""
        body = {
            "model": model, "prompt": list(prompts), "max_tokens": count, "temperature": 0, "ignore_eos": True,
            "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        status, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Generated(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"])
            for prompt, choice in zip(prompts, choices, strict=True)
        ]
