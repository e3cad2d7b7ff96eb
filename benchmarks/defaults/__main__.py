"""`python -m benchmarks.defaults`: run the study trial by trial; write results.json, results.md and defaults.png."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.defaults.picture import draw
from benchmarks.defaults.plan import FULL, MIXINGS, QUICK, Method, Plan, default_scaling, point
from benchmarks.defaults.probes import RANDOM_TOKEN_RATE, random_tokens, unchanged
from benchmarks.defaults.report import markdown
from benchmarks.defaults.results import Results, read, write
from benchmarks.defaults.trials import Lab, Settings, Trial
from benchmarks.measuring.environment import describe

DTYPES = {"bf16": torch.bfloat16, "fp32 (the default)": None}
BRIEF = Settings(base_steps=2, steps=2, windows=3, judged=2, random_token_steps=2, small_steps=2)


def main(arguments: list[str] | None = None) -> int:
    """Run the trials that have no result yet."""
    parser = _parser()
    options = parser.parse_args(arguments)
    settings, plan = (BRIEF, QUICK) if options.quick else (Settings(), FULL)
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = read(options.out / "results.json", settings, describe(torch.device("cpu")))
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {str(options.out)!r}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--out: {error}")
    run(Lab(settings, options.out / "base"), plan, results, options.out / "results.json")
    report = markdown(results, plan)
    (options.out / "results.md").write_text(report, encoding="utf-8")
    draw(results, plan, options.out / "defaults.png")
    print(report)
    print(f"written: {options.out}/results.json, results.md, defaults.png")
    return 0


def run(lab: Lab, plan: Plan, results: Results, path: Path) -> None:
    """Every trial of the plan that is not in the results, then the two short measurements; the file is kept up to date."""
    for stage, trials in plan.stages(results.outcomes):
        progress = tqdm(results.missing(trials), dynamic_ncols=True)
        for trial in progress:
            progress.set_description(f"{stage}: {description(trial)}")
            results.outcomes.append(lab.run(trial))
            write(results, path)
    progress = tqdm(list(random_token_runs()), dynamic_ncols=True)
    for method, scaling in progress:
        name = f"{method}, scaling {scaling:g}"
        progress.set_description(f"random tokens: {name}")
        if name not in results.random_tokens:
            trials = [point(method, scaling, RANDOM_TOKEN_RATE, seed) for seed in plan.seeds]
            results.random_tokens[name] = [random_tokens(lab, trial) for trial in trials]
            write(results, path)
    progress = tqdm(DTYPES.items(), dynamic_ncols=True)
    for name, dtype in progress:
        progress.set_description(f"small steps in {name}")
        if name not in results.unchanged:
            results.unchanged[name] = unchanged(lab, dtype, plan.seeds)
            write(results, path)


def random_token_runs() -> Iterator[tuple[Method, float]]:
    """Methods and scalings that learn random tokens: LoRA at its usual scaling, mixtures at 1 and at the default."""
    yield "LoRA", 2.0
    for method in MIXINGS:
        yield method, 1.0
        yield method, default_scaling(method)


def description(trial: Trial) -> str:
    """A trial in a few words."""
    more = "".join(
        f", {name} {value}" for name, value in (("top_k", trial.top_k), ("gate_init_std", trial.gate_init_std)) if value
    )
    sizes = f"{trial.mixing}, E={trial.num_experts}, R={trial.rank}"
    return f"{sizes}, scaling {trial.scaling:g}, learning rate {trial.learning_rate:g}, seed {trial.seed}{more}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.defaults",
        description="Which scaling and which gate at the start should be the defaults, and what fp32 experts are for. "
        "A run that was stopped continues where it was; the full study takes about 40 minutes of one CPU core.",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a few trials, to see that everything runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU's operations (default 1)")
    parser.add_argument("--out", type=Path, default=Path("build/defaults"), metavar="DIR", help="default build/defaults")
    return parser


if __name__ == "__main__":
    sys.exit(main())
