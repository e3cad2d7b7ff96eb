"""`python -m benchmarks`: measure, and write tables, JSON, Markdown and pictures."""

import argparse
import re
import sys
import time
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measuring import model
from benchmarks.measuring.environment import describe
from benchmarks.measuring.group import Group
from benchmarks.measuring.limits import measure_limits
from benchmarks.measuring.timing import FULL, QUICK
from benchmarks.rows.shapes import DTYPES, PHASES, SCOPES, Grid, cross, grids
from benchmarks.rows.steps import Row
from benchmarks.rows.table import rows
from benchmarks.showing import plots, report

EXAMPLES = """\
examples:
  python -m benchmarks --quick                      every kind of table within two minutes on two CPU cores
  python -m benchmarks                              this device's full set of rows
  python -m benchmarks --shapes 2048x2048,4096x14336 --tokens 1,1024 --dtype float32,bfloat16
  python -m benchmarks --rows frozen,peft,torch --experts 1,8,64 --rank 16 --out results
  python -m benchmarks.showing.compare before/results.json after/results.json

Where none of --shapes, --tokens, --experts, --rank and --dtype is given, the sizes are chosen for the device: on a CPU
2048 x 2048 at T = 1 and 1024 in float32 and bfloat16, E and T varied around it, and a whole model."""


def main(arguments: list[str] | None = None) -> int:
    """Run; 1 where a row gave a wrong result or failed."""
    begun = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be one that torch sees, got 'cuda' without a GPU")
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before anything is measured
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {str(options.out)!r}: {error.strerror}")
    torch.set_num_threads(options.threads)
    chosen, named = _grids(options, device)
    known = rows()
    effort = QUICK if options.quick else FULL

    tables = sum(len(list(grid.groups())) for grid in chosen) + (not named)
    progress = tqdm(total=1 + effort.visits * tables, dynamic_ncols=True, desc="the machine's limits")
    environment = describe(device)
    limits = measure_limits(device, sorted({shape.dtype for grid in chosen for shape in grid.shapes}), options.quick)
    progress.update()
    groups = [
        Group(shape, scope, grid.phases, _pick(known, options.rows, grid, options.quick), device, limits, effort)
        for grid in chosen
        for shape, scope in grid.groups()
    ]
    plan = model.plan_for(device, options.quick)
    whole = [] if named else [model.Models(plan, device, effort)]
    broken = 0
    try:
        for visit, job in product(range(effort.visits), (*whole, *groups)):
            if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
                environment["stopped"] = f"after step {progress.n} of {progress.total}, its minutes were over"
                break
            progress.set_description(f"visit {visit + 1} of {effort.visits}, {job}")
            try:
                job.visit()
            except Exception:  # a table that breaks must not end the measurement of the others
                print(f"\n{job}:\n{traceback.format_exc()}", file=sys.stderr)
                broken += 1
            progress.update()
    except KeyboardInterrupt:
        environment["stopped"] = f"at step {progress.n + 1} of {progress.total}, by the user"
    progress.close()
    records = [record for group in groups for record in group.records()]
    models = [record for job in whole for record in job.records()]

    method = (
        f"{effort.visits} visits of {effort.min_rounds} to {effort.max_rounds} rounds, rows in another order each, "
        "copies of the inputs in turn, larger than the last cache together"
    )
    results = report.make_results(environment, limits, method, records, models, plan.description)
    print(report.terminal(results))
    _write(results, options.out)
    bad = [r for r in (*records, *models) if r.status.startswith(("wrong", "failed"))]
    for record in bad:
        print(f"{record.row}: {record.status}", file=sys.stderr)
    return int(bool(bad or broken))


def _write(results: report.Results, folder: Path) -> None:
    paths = report.write(results, folder)
    try:
        paths += plots.draw(results, folder)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("\nno pictures: matplotlib is not installed (pip install matplotlib)")
    print("\nwritten: " + ", ".join(str(path) for path in paths))


def _grids(options: argparse.Namespace, device: torch.device) -> tuple[list[Grid], bool]:
    """The grids to measure, and whether the user named sizes."""
    named = {key: getattr(options, key) for key in ("shapes", "tokens", "experts", "rank", "dtype")}
    if not any(named.values()):
        return grids(device, options.quick), False
    defaults: dict[str, Any] = {
        "shapes": [(2048, 2048)], "tokens": [1, 1024], "experts": [8], "rank": [16], "dtype": ["float32"],
    }  # fmt: skip
    shapes = cross(*(value or defaults[key] for key, value in named.items()))
    return [Grid(shapes, scopes=SCOPES, phases=PHASES)], True


def _pick(known: Any, named: list[str] | None, grid: Grid, quick: bool) -> list[Row]:
    """The rows of a grid: those that the user names; else the grid's own, with --quick without torch.compile."""
    if named is not None:
        return [known[name] for name in named]
    names = grid.rows or tuple(known)
    return [known[name] for name in names if name in known and not (quick and known[name].compiled)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="The cost of L-MoE on a frozen layer, compared with what is used today and with the machine's limits.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no torch.compile")
    parser.add_argument(
        "--shapes", type=_features, metavar="IxO,...", help="in_features x out_features: 2048x2048,4096x14336"
    )
    parser.add_argument("--tokens", type=_integers, metavar="T,...", help="numbers of tokens: 1,1024")
    parser.add_argument("--experts", type=_integers, metavar="E,...", help="numbers of experts: 1,8,64")
    parser.add_argument("--rank", type=_integers, metavar="R,...", help="ranks of one expert: 4,16")
    parser.add_argument("--dtype", type=_names(DTYPES), metavar="NAME,...", help=", ".join(DTYPES))
    parser.add_argument("--rows", type=_names(rows()), metavar="NAME,...", help=", ".join(rows()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help=f"default here: {default_device}")
    parser.add_argument("--threads", type=_count, default=2, help="threads of the CPU's operations (default 2)")
    parser.add_argument("--minutes", type=_count, metavar="N", help="start no further table after N minutes")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), metavar="DIR", help="default build/benchmarks")
    return parser


def _features(text: str) -> list[tuple[int, int]]:
    pairs = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split(",")]
    if any(pair is None or 0 in (int(pair[1]), int(pair[2])) for pair in pairs):
        raise argparse.ArgumentTypeError(f"must be in_features x out_features, like 2048x2048,4096x14336, got {text!r}")
    return [(int(pair[1]), int(pair[2])) for pair in pairs if pair]


def _integers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be positive integers, like 1,1024, got {text!r}")
    return [int(part) for part in parts]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _names(known: Any):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be among {', '.join(map(repr, known))}, got {name!r}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
