"""`python -m benchmarks.model`: model the CUDA engine from its machine code, next to its floor and to the `torch` backend.

Needs nvcc, and no GPU: nothing is measured. The cubins are kept in build/model, for as long as csrc/ and nvcc stay the same.
On an H200 the model was wrong by factors of 1.2 to 1.6: benchmarks/results/model/README.md.
"""

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.inspect.machine_code import MachineCodeError
from benchmarks.measuring.environment import commit
from benchmarks.model import cubins, report, steps
from benchmarks.model.chips import CHIPS, inputs
from benchmarks.model.kernels import Call, Machine
from benchmarks.rows.shapes import Shape

KEPT = cubins.ROOT / "build" / "model"
TOKENS = (1, 16, 64, 512, 4096, 8192, 16384)
SHAPES = [Shape(tokens, 4096, 4096, 8, 16, "bfloat16") for tokens in TOKENS] + [
    Shape(8192, 8192, 8192, 8, 16, "bfloat16"),
    Shape(8192, 2048, 2048, 8, 16, "bfloat16"),
    Shape(8192, 4096, 14336, 8, 16, "bfloat16"),
    Shape(8192, 4096, 4096, 16, 64, "bfloat16"),
]


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 2 where the machine code cannot be had or read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS), help="all, if none is named")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write model.txt and model.json")
    parser.add_argument(
        "--before", type=Path, metavar="FILE", help="JSON of an earlier run, to print both; compare.txt in --out"
    )
    args = parser.parse_args(arguments)
    if args.before is not None and not args.before.is_file():
        parser.error(f"--before: {args.before} is no file")
    try:
        found = cubins.kernels(cubins.TARGETS, KEPT)
        machines = {arch: Machine(arch, builds) for arch, builds in found.items()}
        of_archs = {arch: steps.lines(machine) for arch, machine in machines.items()}
        rows = [row for name in args.chip for shape in SHAPES for row in rows_of(name, shape, machines)]
    except MachineCodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    date, nvcc = datetime.now(timezone.utc).strftime("%Y-%m-%d"), cubins.nvcc_version()
    title = f"A MODEL, nothing was measured. The CUDA engine at commit {commit()}, nvcc {nvcc}, {date}; bf16."
    tables = [report.summary(rows), steps.table(of_archs), *map(report.table, rows)]
    text = "\n\n".join([f"{title}\n{report.MEASURED}", inputs(), report.LEGEND, *tables])
    print(text)
    facts = {"what": "a model, nothing was measured", "commit": commit(), "nvcc": nvcc, "date": date}
    kernels = {arch: [line.record() for line in lines] for arch, lines in of_archs.items()}
    content = facts | {"kernels": kernels, "rows": [row.record() for row in rows]}
    if args.out is not None:
        report.write(args.out, "model", text, content)
    if args.before is not None:
        both = report.comparison(json.loads(args.before.read_text(encoding="utf-8")), content)
        print(f"\n{both}")
        if args.out is not None:
            (args.out / "compare.txt").write_text(f"{both}\n", encoding="utf-8")
    return 0


def rows_of(name: str, shape: Shape, machines: dict[str, Machine]) -> list[report.Row]:
    """Forward and backward of a shape on a chip."""
    chip = CHIPS[name]
    call = Call(chip, machines[chip.arch], shape)
    return [report.Row(chip, shape, direction, *getattr(call, direction)()) for direction in report.DIRECTIONS]


if __name__ == "__main__":
    sys.exit(main())
