"""An engine in a process of its own, which measures what it is asked to: one JSON object a line, in and out."""
# pyright: reportMissingImports=false

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.rows import ROWS, VOCABULARY, options_of


def main() -> None:
    """Answer requests until the input ends: [name of a measurement, its arguments]."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not mix with the answers
    name, folder, device = sys.argv[1:]
    engine = Engine(name, Path(folder), device)
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        print(json.dumps(getattr(engine, what)(*arguments)), file=answers)


class Engine:
    """An engine of vLLM in this process."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        if device == "cpu":
            torch.set_num_threads(1)
        row, self.device = ROWS[name], device
        self.lora = LoRARequest("lora", 1, str(folder / "lora")) if row.adapter == "lora" else None
        self.engine = LLM(**options_of(row, folder, device)).llm_engine
        self.requests = 0

    def generate(self, length: int, count: int) -> dict[str, Any]:
        """A prompt, the tokens generated greedily, and their log-probabilities."""
        prompt = self._prompt(length)
        self._add(prompt, count, logprobs=0)
        last: Any = None
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                last = output.outputs[0]
        tokens = list(last.token_ids)
        logprobs = [step[token].logprob for step, token in zip(last.logprobs, tokens, strict=True)]
        return {"prompt": prompt, "tokens": tokens, "logprobs": logprobs}

    def decode(self, requests: int, steps: int) -> dict[str, float]:
        """Tokens a second while every request generates one token a step: of the wall clock, and of CPU time."""
        done, total = [0] * requests, steps + 2
        first = self.requests
        for _ in range(requests):
            self._add(self._prompt(16), total)
        walls, cpus = [], []
        while self.engine.has_unfinished_requests():
            all_decode = min(done) >= 1
            wall, cpu = time.perf_counter(), time.process_time()
            outputs = self.engine.step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            for output in outputs:
                done[int(output.request_id.split("-")[0]) - first] = len(output.outputs[0].token_ids)
            if all_decode and len(outputs) == requests:
                walls.append(wall)
                cpus.append(cpu)
        return {"wall": requests / statistics.median(walls), "cpu": requests / statistics.median(cpus)}

    def prefill(self, requests: int, length: int) -> dict[str, float]:
        """Tokens a second of prompts that are read together."""
        for _ in range(requests):
            self._add(self._prompt(length), 1)
        wall, cpu = time.perf_counter(), time.process_time()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        tokens = requests * length
        return {"wall": tokens / (time.perf_counter() - wall), "cpu": tokens / (time.process_time() - cpu)}

    def _add(self, prompt: list[int], count: int, logprobs: int | None = None) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=logprobs)
        self.engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, params, lora_request=self.lora)
        self.requests += 1

    def _prompt(self, length: int) -> list[int]:
        return random.choices(range(2, VOCABULARY), k=length)


if __name__ == "__main__":
    main()
