"""`make racecheck`: the kernels under ThreadSanitizer and AddressSanitizer on many schedules, then every seeded bug.

It replaces compute-sanitizer's memcheck, racecheck and synccheck, which need a GPU. It fails if a kernel is
not clean or a bug is not caught: by ThreadSanitizer if the bug is a race, otherwise with the message of bugs.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tools.emulator import build
from tools.emulator.bugs import BUGS, PROBLEMS, Bug


def clean(cache: Path, target: str, kind: str, first: int, problems: int) -> bool:
    """Run the kernels as they are; print and return whether nothing was found."""
    done = build.run_driver(build.build_driver(cache, kind, target), first, problems)
    verdict = "clean" if done.returncode == 0 else "NOT CLEAN"
    print(f"{target:<8} {problems:>4} {kind:<8}, 2 schedules each: {verdict}", flush=True)
    if done.returncode != 0:
        print(done.stdout[-6000:])
    return done.returncode == 0


def caught(cache: Path, bug: Bug) -> bool:
    """Plant a bug; print and return whether it was caught."""
    target, message = ("thread", "ThreadSanitizer: data race") if bug.is_race else (bug.target, bug.caught_as)
    with tempfile.TemporaryDirectory() as folder:
        driver = build.build_driver(cache, bug.kind, target, bug.plant(Path(folder)))
        done = build.run_driver(driver, bug.first_problem, PROBLEMS)
    found = done.returncode != 0 and message in done.stdout
    print(f"{bug.name:<55} {'caught: ' + message if found else 'NOT CAUGHT'}", flush=True)
    return found


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first problem")
    parser.add_argument("--cache", type=Path, default=Path("build/cuda_emu"))
    options = parser.parse_args()
    cache = options.cache.resolve()
    problems = {"plain": 300, "address": 40, "thread": 16}
    good = [clean(cache, target, kind, options.seed, count) for target, count in problems.items() for kind in build.PROGRAMS]
    good += [caught(cache, bug) for bug in BUGS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
