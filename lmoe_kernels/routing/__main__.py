# SPDX-License-Identifier: Apache-2.0
"""`python -m lmoe_kernels.routing report DIR` writes the report on statistics that `RoutingStats.save` has written."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmoe_kernels.routing.report import TITLE, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        the exit status: 1, after one line on stderr, if there is nothing to report on or a package is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m lmoe_kernels.routing", description=__doc__)
    commands = parser.add_subparsers(required=True)
    report = commands.add_parser("report", help="write statistics as an HTML page")
    report.add_argument("directory", type=Path, help="what RoutingStats.save has written")
    report.add_argument("--out", type=Path, help="the file (default: report.html in the directory)")
    report.add_argument("--title", default=TITLE, help="the heading of the page")
    args = parser.parse_args(arguments)
    out = args.out or args.directory / "report.html"
    try:
        write_report(args.directory, out, args.title)
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
