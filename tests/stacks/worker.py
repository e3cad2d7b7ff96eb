"""One of two processes: runs every check and writes its outcome."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

import torch
from torch import distributed

WORLD = 2
TIMEOUT = timedelta(seconds=60)


class Outcome(TypedDict):
    """The parts of a check that passed, and the error of the next part."""

    passed: list[str]
    error: str | None


def outcome_of(check: Callable[[int, Path], Iterator[str]], seed: int, folder: Path) -> Outcome:
    outcome = Outcome(passed=[], error=None)
    try:
        for part in check(seed, folder):
            outcome["passed"].append(part)
    except BaseException:  # the failures of pytest are not Exceptions
        outcome["error"] = traceback.format_exc()
    torch._dynamo.reset()
    return outcome


def main(rank: int, seed: int, folder: Path) -> None:
    from tests.stacks.checks import CHECKS

    report: dict[str, Outcome] = {}
    for name, check in CHECKS.items():
        # a group for each check: no check receives messages of another one
        store = distributed.PrefixStore(name, distributed.FileStore(str(folder / "store"), WORLD))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
        report[name] = outcome_of(check, seed, folder / name)
        distributed.destroy_process_group()
        (folder / f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    os.environ |= {
        "RANK": sys.argv[1],
        "LOCAL_RANK": sys.argv[1],
    }  # for Accelerate, which uses the existing group
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
