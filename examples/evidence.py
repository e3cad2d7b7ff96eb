"""Is a mixture of LoRA experts worth it? The study behind docs/evidence.md, which anyone can run.

A small Llama of bytes is trained on English and frozen. Then, with three seeds each:
(a) gate and experts are trained together on three domains, against one LoRA of the same size;
(b) LoRAs that were trained apart, each on one domain, are composed by a gate that sees one token, or the whole prefix;
(c) a fourth domain comes later: an expert is added, or one LoRA is trained on.

Every finished row is kept in results.jsonl, and a run that was stopped goes on from there. The whole study takes about an
hour of one CPU core; one row takes minutes:

    python examples/evidence.py                                        # everything, into build/evidence
    python examples/evidence.py --list                                 # the names of the rows
    python examples/evidence.py --only "uniform average" --seeds 0 1   # some rows
    python examples/evidence.py --tables                               # the tables and pictures of the finished rows
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from corpus import Domain, load_bytecode, load_domains
from study import adding, composing, joint
from study.lab import TINY, Lab, Sizes, mean_of
from study.log import TUNING_SEED, Log, Row, Settings
from study.method import Method
from study.pictures import draw
from study.tables import Results, fill, markdown
from tqdm import tqdm

KEPT = Path(__file__).parents[1] / "benchmarks" / "results" / "evidence" / "results.jsonl"  # of the run in the documentation

TITLES = {
    "joint": "Trained together, on English, Python and C",
    "grid": "The same on the windows that choose, seed 0; the chosen settings are bold",
    "changed": "With one thing changed, and at the defaults",
    "composing": "Trained apart, one on each of four domains, then composed",
    "adding": "A fourth domain later: mean of the seeds, least and greatest",
}
PARTS = ("joint", "composing", "adding")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows that have no result yet, or write the tables."""
    parser = _parser()
    args = parser.parse_args(arguments)
    methods = [*joint.methods(), *composing.methods(), *adding.methods()]
    if args.list:
        print("\n".join(f"{method.part:<10} {method.name}" for method in methods))
        return
    names = [method.name for method in methods]
    if unknown := [name for name in args.only if name not in names]:
        parser.error(f"--only must name rows (see --list), got {unknown[0]!r}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "results.jsonl")
    if not args.tables:
        wanted = [m for m in methods if m.part in args.parts and (not args.only or m.name in args.only)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        study = Study(log, methods, Log(KEPT), TINY if args.tiny else Sizes(), out / "models", device)
        for seed in args.seeds:
            study.run(wanted, seed)
    write(log, out, args.page)


def write(log: Log, out: Path, page: Path | None) -> None:
    """Print the tables; write tables.md and the pictures; and fill the tables into a page that has their markers."""
    tables = markdown(log)
    parts = [f"## {title}\n\n{tables[name]}" for name, title in TITLES.items()]
    text = "\n".join(["# Is a mixture of LoRA experts worth it?\n", tables["run"], *parts])
    (out / "tables.md").write_text(text, encoding="utf-8")
    draw(Results(log), out)
    if page is not None:
        fill(page, tables)
    print(text)


class Study:
    """Runs rows, and keeps their results."""

    def __init__(self, log: Log, methods: Sequence[Method], kept: Log, sizes: Sizes, models: Path, device: str) -> None:
        self.log, self.kept, self.sizes, self.models, self.device = log, kept, sizes, models, device
        self.methods = {method.name: method for method in methods}
        self._domains: list[Domain] = []

    def run(self, methods: Sequence[Method], seed: int) -> None:
        """The rows of one seed. With the tuning seed all candidates are tried, with the others the best of them."""
        lab = None
        progress = tqdm(methods, desc=f"seed {seed}", unit="row", file=sys.stderr)
        for method in progress:
            for settings in self._settings(method, seed):
                if self.log.find(method.name, seed, settings) is None:
                    lab = lab or Lab(self.sizes, self.domains(), self.models, seed, self.device)
                    lab.label = f"  {method.name}" + "".join(f", {key} {value:g}" for key, value in settings.items())
                    row = self._row(method, lab, settings)
                    self.log.append(row)
                    progress.write(f"{lab.label.strip()}, seed {seed}: {mean_of(row['bits'])} bits per byte")

    def domains(self) -> list[Domain]:
        """The four domains, read once."""
        self._domains = self._domains or [*load_domains(), load_bytecode()]
        return self._domains

    def _settings(self, method: Method, seed: int) -> tuple[Settings, ...]:
        """Those to run with a seed: the candidates, or the chosen ones, from the kept results where this log has none."""
        owner = self.methods[method.settings_of or method.name]
        if owner is method and (seed == TUNING_SEED):
            return method.candidates
        for log in (self.log, self.kept):
            if (best := log.best(owner.name, owner.candidates)) is not None:
                return (best,)
        self.run([owner], TUNING_SEED)
        return self._settings(method, seed)

    def _row(self, method: Method, lab: Lab, settings: Settings) -> Row:
        facts = {
            "machine": f"{_processor(self.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        }
        key = {"part": method.part, "name": method.name, "seed": lab.seed, "settings": dict(settings)}
        return key | method.run(lab, settings) | facts


def _processor(device: str) -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/evidence", help="folder of the results (default: build/evidence)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--parts", nargs="+", choices=("joint", "composing", "adding"), default=("joint", "composing", "adding")
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these rows alone")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--tables", action="store_true", help="train nothing: write the tables and pictures of the results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also fill the tables into this page")
    parser.add_argument("--tiny", action="store_true", help="a few steps only, to see that everything runs")
    return parser


if __name__ == "__main__":
    main()
