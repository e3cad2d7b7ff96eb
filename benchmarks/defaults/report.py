"""The study as Markdown: every table, with the losses as measured."""

from collections.abc import Iterable
from statistics import mean

from benchmarks.defaults.plan import METHODS, MIXINGS, USUAL, Plan, default_scaling, method_of, point
from benchmarks.defaults.probes import RANDOM_TOKEN_RATE, SMALL_RATE
from benchmarks.defaults.results import Results
from benchmarks.defaults.trials import Outcome, Trial

DIVERGED = "diverged"


class Tables:
    """Results by trial, and the tables made of them."""

    def __init__(self, results: Results, plan: Plan) -> None:
        self.results, self.plan = results, plan
        self.known: dict[Trial, Outcome] = {outcome.trial: outcome for outcome in results.outcomes}

    def reported(self, trials: Iterable[Trial]) -> list[float | None]:
        """Bits on the windows that are not used for choosing, of the trials that were run."""
        return [self.known[trial].reported for trial in trials if trial in self.known]

    def tuned(self) -> list[list[str]]:
        """Every method at the learning rate and scaling that tuning chose, on all seeds."""
        lora = self._seeds(self.plan.best(self.results.outcomes, "LoRA").trial)
        table = [["", "learning rate", "scaling", *(f"seed {seed}" for seed in self.plan.seeds), "mean", "less one LoRA"]]
        for method in METHODS:
            chosen = self.plan.best(self.results.outcomes, method).trial
            bits = self._seeds(chosen)
            paired = [_bits(a - b, "+.3f") if a and b else "" for a, b in zip(bits, lora, strict=True)]
            against = "" if method == "LoRA" else " ".join(paired)
            table.append(
                [method, f"{chosen.learning_rate:g}", f"{chosen.scaling:g}", *map(_bits, bits), _mean(bits), against]
            )
        return table

    def scalings(self) -> list[list[str]]:
        """Bits over scaling and learning rate: the mean over the seeds that were run."""
        table = [["", "learning rate", *("scaling " + f"{s:g}" for s in self._all_scalings())]]
        for method in METHODS:
            for rate in self.plan.grid[method]:
                cells = []
                for scaling in self._all_scalings():
                    mark = "**" if scaling == default_scaling(method) else ""
                    cell = _mean(self.reported(point(method, scaling, rate, seed) for seed in self.plan.seeds))
                    cells.append(f"{mark}{cell}{mark}" if cell else "")
                table.append([method, f"{rate:g}", *cells])
        return table

    def other_sizes(self) -> list[list[str]]:
        """Bits over the number of experts and the scaling as a multiple of it."""
        table = [["", "experts", *(f"scaling {k:g} E" for k in self.plan.scalings_over_experts)]]
        trials = list(self.plan.other_sizes())
        for mixing in MIXINGS:
            for experts in self.plan.experts:
                row = [trial for trial in trials if (trial.mixing, trial.num_experts) == (mixing, experts)]
                table.append([mixing, str(experts), *(_mean(self.reported([trial])) for trial in row)])
        return table

    def top_2(self) -> list[list[str]]:
        """Bits where each token takes two experts of eight."""
        table = [["top_k=2", *(f"scaling {s:g}" for s in self.plan.scalings_of_top_2)]]
        trials = list(self.plan.top_2())
        for mixing in MIXINGS:
            table.append([mixing, *(_mean(self.reported([trial])) for trial in trials if trial.mixing == mixing)])
        return table

    def gates(self) -> list[list[str]]:
        """Bits and likeness of the experts over the gate at the start."""
        table = [["", "gate_init_std", "bits", "mean cosine between two experts' B"]]
        trials = list(self.plan.gates())
        for mixing in MIXINGS:
            for std in self.plan.gate_init_stds:
                row = [trial for trial in trials if (trial.mixing, trial.gate_init_std) == (mixing, std)]
                alike = [self.known[trial].likeness for trial in row if trial in self.known]
                name = "1/sqrt(in_features)" if std is None else f"{std:g}"
                table.append([mixing, name, _mean(self.reported(row)), _mean(alike, ".2f")])
        return table

    def random_tokens(self) -> list[list[str]]:
        """Losses in nats on random tokens that were learned by heart."""
        seeds = [f"seed {seed}" for seed in self.plan.seeds]
        rows = [[name, *map(_bits, losses), _mean(losses)] for name, losses in self.results.random_tokens.items()]
        return [["", *seeds, "mean"], *rows]

    def unchanged(self) -> list[list[str]]:
        """Shares of entries that no step has changed."""
        rows = [
            [dtype, *(f"{100 * share:.1f} %" if share < 0.9995 else "100 %" for share in shares.values())]
            for dtype, shares in self.results.unchanged.items()
        ]
        return [["experts and gate in", "A", "B", "gate"], *rows]

    def _seeds(self, trial: Trial) -> list[float | None]:
        method = method_of(trial)
        return self.reported(point(method, trial.scaling, trial.learning_rate, seed) for seed in self.plan.seeds)

    def _all_scalings(self) -> list[float]:
        return sorted({s for rates in self.plan.grid.values() for scalings in rates.values() for s in scalings})


def markdown(results: Results, plan: Plan) -> str:
    """All tables, with machine, versions and settings."""
    tables, settings, facts = Tables(results, plan), results.settings, results.environment
    packages = ", ".join(f"{name} {version}" for name, version in dict(facts["packages"]).items())  # type: ignore[call-overload]
    usual = f"learning rate {USUAL:g}"
    parts = [
        ("Tuned on both sides", tables.tuned()),
        ("Learning rate and scaling; the default in bold", tables.scalings()),
        (f"Other numbers of experts, E R = 32, {usual}, one seed", tables.other_sizes()),
        (f"Two of eight experts for each token, {usual}, one seed", tables.top_2()),
        (f"The gate at the start, default scaling, {usual}, one seed", tables.gates()),
        (
            f"Random bytes learned by heart, {settings.random_token_steps} steps, learning rate {RANDOM_TOKEN_RATE:g}, nats",
            tables.random_tokens(),
        ),
        (
            f"Entries unchanged after {settings.small_steps} AdamW steps at {SMALL_RATE:g} over a bf16 base",
            tables.unchanged(),
        ),
    ]
    lines = [
        "# The study behind the defaults",
        "",
        f"{facts['device']}, {facts['threads']} threads; {facts['date']}, commit {facts['commit']}; {packages}",
        "",
        f"Validation bits per byte, mean over English, Python and C; lower is better. Base {settings.base_steps} steps on "
        f"English; adapters {settings.steps} steps of {settings.windows} windows of 128 bytes; {settings.judged} windows of "
        "each domain choose, as many others are reported. Seeds "
        f"{', '.join(map(str, plan.seeds))}; where seeds were not all run, the mean is over those that were.",
    ]
    for title, (header, *rows) in parts:
        rule = ["---", *["---:"] * (len(header) - 1)]
        lines += ["", f"## {title}", "", *("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))]
    return "\n".join(lines) + "\n"


def _mean(values: Iterable[float | None], form: str = ".3f") -> str:
    """The mean; "diverged" where one of the trials did; empty where there are no values."""
    values = list(values)
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return DIVERGED
    return format(mean(numbers), form) if numbers else ""


def _bits(value: float | None, form: str = ".3f") -> str:
    return DIVERGED if value is None else format(value, form)
