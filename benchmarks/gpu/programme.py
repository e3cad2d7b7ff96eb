"""The programme's bookkeeping: steps in their order, results as they come, and where the last call stopped.

A part is a sequence of steps. A step's lines are written when it ends, into a file named after the part and the state of the
sources; a step that the file has is not repeated. So a call continues where the one before it stopped, changed sources are
measured anew, and what was measured before stays.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring.environment import describe

Line = dict[str, Any]  # one of the files that are written
ROOT = Path(__file__).parents[2]
MEASURED = ("lmoe_kernels/**/*.py", "csrc/**/*.cu*", "csrc/**/*.cpp", "csrc/**/*.h")
FATAL = ("illegal memory access", "misaligned address", "illegal instruction", "launch failure", "device-side assert")


class Step(NamedTuple):
    """What is run at a time: a few seconds, or a run of the tests."""

    name: str
    lines: Callable[[], Iterable[Line]]


@dataclass
class Programme:
    """A call: where its results are, and when it must end."""

    folder: Path
    device: torch.device
    end: float = float("inf")  # by the clock of `time.monotonic`
    known: dict[str, list[Line]] = field(default_factory=dict)  # of each part that was read or written

    def seconds_left(self) -> float:
        """Until the time is up."""
        return self.end - time.monotonic()

    def lines(self, part: str) -> list[Line]:
        """What a part has measured on these sources, in this call or before."""
        if part not in self.known:
            path = self._path(part)
            self.known[part] = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
        return self.known[part]

    def wrong(self) -> set[str]:
        """The engines whose last tests failed: their speed is not measured."""
        last = {(part, line["step"]): line for part in ("tests-large", "tests") for line in self.lines(part)}
        return {line["engine"] for line in last.values() if not line["passed"]}

    def perform(self, part: str, steps: Iterable[Step]) -> bool:
        """Run the steps of a part that are left; whether all are done and passed."""
        good = True
        for step in steps:
            done = {line["step"]: line for line in self.lines(part)}.get(step.name)
            if done is not None and done.get("passed", True):
                continue
            if self.seconds_left() <= 0:
                print(f"benchmarks.gpu: the time is up before {part}, {step.name}", file=sys.stderr)
                return False
            start = time.monotonic()
            lines = [{"step": step.name} | line for line in self._lines_of(step)]
            self._write(part, lines)
            good = good and bool(lines) and all(line.get("passed", True) and "error" not in line for line in lines)
            verdict = ": not finished" if not lines else f": {lines[0]['error']}" if "error" in lines[0] else ""
            seconds = time.monotonic() - start
            if verdict or seconds >= 1:  # the tuner has hundreds of steps
                print(f"benchmarks.gpu: {part}, {step.name}{verdict} ({seconds:.0f} s)", file=sys.stderr)
        return good

    def _lines_of(self, step: Step) -> list[Line]:
        """The lines of a step, or of its error; if the GPU must be left then, nothing further is started in this call."""
        try:
            return list(step.lines())
        except Exception as error:  # one step must not end the others
            if is_fatal(str(error)):
                self.end = time.monotonic()
            return [{"error": f"{type(error).__name__}: {error}"[:300]}]

    def _write(self, part: str, lines: list[Line]) -> None:
        path, known = self._path(part), self.lines(part)
        if not path.exists():
            path.write_text(json.dumps(describe(self.device)) + "\n")
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        known += lines

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}-{state_of_the_sources()}.jsonl"


def is_fatal(error: str) -> bool:
    """Whether no kernel can run in this process after this error of CUDA."""
    return any(kind in error for kind in FATAL)


def state_of_the_sources() -> str:
    """A name for what is measured: the sources of the package and of its extension."""
    paths = sorted(path for pattern in MEASURED for path in ROOT.glob(pattern))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]
