"""Test, measure and tune on this machine's GPU.

    python -m benchmarks.gpu [--parts limits tests-large tests goals compiled tiles experts sanitizers] [--minutes 9]
        [--out DIR]

Each part writes a file of JSON lines into build/gpu/<device>/; goals and compiled go into results.json and results.md too.
Nothing is started after --minutes. The next call with the same command continues where this one stopped: what the files
have for the present sources is not repeated, but for tests that failed. The speed of an engine whose tests failed is not
measured. At its end a call shows the fastest tiles.

Seconds that the parts took on an H200 with 16 cores (2026-11-26), on a machine that is lent for 15 minutes:

    limits                  3
    tests-large, tests     32   24 once kernels are compiled
    goals, compiled        70   a table of the goals takes 2 to 6; those of torch.compile wait for its compiler
    tiles                  35   the tuner on two shapes; its fastest plans then go into hopper.py or configs.py
    experts                 -   E = 8..128: not run so far
    sanitizers             19   with those of both engines at once; here they follow one another
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import tuner
from benchmarks.gpu.parts import EFFORT, PARTS
from benchmarks.gpu.programme import ROOT, Programme
from benchmarks.measuring.environment import describe, device_name
from benchmarks.showing import report


def main(arguments: list[str] | None = None) -> int:
    """Run the parts in their order; 1 where one failed or is not finished."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in this order")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing further after so many")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: build/gpu/<device>")
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes
    device = this_gpu()
    if device is None:
        print("benchmarks.gpu: there is no CUDA device", file=sys.stderr)
        return 1
    folder = args.out or ROOT / "build" / "gpu" / device_name(device).lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    programme = Programme(folder, device, end)
    good = [programme.perform(part, steps(programme)) for part, steps in PARTS.items() if part in args.parts]
    for line in tuner.summary(programme.lines("tiles")):
        print(line)
    if programme.lines("limits") and programme.lines("goals"):
        report.write(results(programme), folder)
    return int(not all(good))


def this_gpu() -> torch.device | None:
    """The current CUDA device; None if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def results(programme: Programme) -> report.Results:
    """The goals' lines in the form that `python -m benchmarks` writes and compares."""
    method = f"{EFFORT.visits} visits of {EFFORT.min_rounds} to {EFFORT.max_rounds} rounds"
    return {
        "schema": report.SCHEMA,
        "environment": describe(programme.device),
        "limits": programme.lines("limits")[-1],
        "method": method,
        "records": programme.lines("goals") + programme.lines("compiled"),
        "model": "",
        "models": [],
    }


if __name__ == "__main__":
    sys.exit(main())
