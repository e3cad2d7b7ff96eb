"""The tables of the study, as Markdown, from the finished rows."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from study import adding, composing, joint
from study.lab import mean_of
from study.log import TUNING_SEED, Log, Row, Settings

OLD = composing.DOMAINS[:3]
Cells = list[str]


class Results:
    """The rows of every method at the settings that were chosen for it."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.methods = {m.name: m for m in (*joint.methods(), *composing.methods(), *adding.methods())}

    def settings(self, name: str) -> Settings | None:
        """The chosen settings; None before all candidates were tried."""
        method = self.methods[name]
        owner = self.methods[method.settings_of or name]
        return self.log.best(owner.name, owner.candidates)

    def rows(self, name: str) -> dict[int, Row]:
        """The rows of a method by seed; none before its settings are chosen."""
        settings = self.settings(name)
        return {} if settings is None else {row["seed"]: row for row in self.log.seeds(name, settings)}

    def bits(self, name: str, domains: Sequence[str] = ()) -> dict[int, float]:
        """Mean bits per byte over some of the domains, or all, by seed. Trials that diverged are left out."""
        means = {seed: mean_of(row["bits"], domains) for seed, row in self.rows(name).items()}
        return {seed: value for seed, value in means.items() if value is not None}

    def oracle(self) -> dict[int, float]:
        """The loss where every domain has its own LoRA, by seed."""
        of_domain = [self.bits(f"LoRA of {domain}", [domain]) for domain in composing.DOMAINS]
        return {seed: mean(bits[seed] for bits in of_domain) for seed in _seeds_of_all(of_domain)}

    def best_alone(self) -> dict[int, float]:
        """The loss of the best of the LoRAs that were trained apart, on all domains, by seed."""
        alone = [self.bits(f"LoRA of {domain}") for domain in composing.DOMAINS]
        return {seed: min(bits[seed] for bits in alone) for seed in _seeds_of_all(alone)}


def joint_table(results: Results, names: Sequence[str]) -> list[Cells]:
    """Methods of part (a): settings, every seed, and the difference from one LoRA with the same seed."""
    lora = results.bits("one LoRA")
    table = [["", "scaling", "learning rate", "parameters", "seed 0", "seed 1", "seed 2", "mean", "less one LoRA"]]
    for name in names:
        bits, settings = results.bits(name), results.settings(name)
        if not bits or settings is None:
            continue
        parameters = next(iter(results.rows(name).values()))["parameters"]
        differences = [bits[seed] - lora[seed] for seed in sorted(bits.keys() & lora.keys())]
        table.append([
            name, f"{settings['scaling']:g}", f"{settings['rate']:g}", f"{parameters:,}",
            *(f"{bits[seed]:.3f}" if seed in bits else "" for seed in range(3)), f"{mean(bits.values()):.3f}",
            "" if name == "one LoRA" else " ".join(f"{d:+.3f}" for d in differences),
        ])  # fmt: skip
    return table


def grid_table(results: Results) -> list[Cells]:
    """What the windows for choosing said of every candidate of part (a); the chosen one is bold."""
    table = [["", "scaling", *(f"learning rate {rate:g}" for rate in joint.RATES)]]
    for name, scalings in joint.SCALINGS.items():
        for scaling in scalings:
            cells = [name, f"{scaling:g}"]
            for rate in joint.RATES:
                settings = {"scaling": scaling, "rate": rate}
                row = results.log.find(name, TUNING_SEED, settings)
                cell = "" if row is None else "diverged" if row["chosen_by"] is None else f"{row['chosen_by']:.3f}"
                cells.append(f"**{cell}**" if cell and settings == results.settings(name) else cell)
            table.append(cells)
    return table


def composing_rows(results: Results) -> dict[str, dict[int, float]]:
    """The rows of part (b), from the frozen base to the LoRA that has seen everything: the loss by seed."""
    routers = [name for router in composing.ROUTERS for name in (router, f"{router}, {composing.RIDGE}")]
    return {
        "frozen base": results.bits("base"),
        composing.ALONE: results.best_alone(),
        composing.AVERAGE: results.bits(composing.AVERAGE),
        **{name: results.bits(name) for name in routers},
        composing.ORACLE: results.oracle(),
        composing.EVERYTHING: results.bits(composing.EVERYTHING),
    }


def way_to_oracle(results: Results) -> dict[str, dict[int, float]]:
    """How far each row of part (b) is from the average, 0, to the oracle, 1, by seed."""
    rows = composing_rows(results)
    average, oracle = rows[composing.AVERAGE], rows[composing.ORACLE]
    return {
        name: {s: (average[s] - bits[s]) / (average[s] - oracle[s]) for s in bits if s in average and s in oracle}
        for name, bits in rows.items()
    }


def composing_table(results: Results) -> list[Cells]:
    """Part (b): trained parameters, every seed, and how far from the average to the oracle."""
    table = [["", "parameters", "seed 0", "seed 1", "seed 2", "mean", "from average to oracle"]]
    ways = way_to_oracle(results)
    for name, bits in composing_rows(results).items():
        if not bits:
            continue
        found = list(results.rows(name).values()) if name in results.methods else []
        parameters = f"{found[0]['parameters']:,}" if found and found[0]["parameters"] else ""
        bounds = {composing.AVERAGE: "0 %", composing.ORACLE: "100 %"}
        table.append([
            name, parameters, *(f"{bits[seed]:.3f}" if seed in bits else "" for seed in range(3)),
            f"{mean(bits.values()):.3f}", bounds.get(name, _spread(ways[name].values(), percent=True)),
        ])  # fmt: skip
    return table


def adding_table(results: Results) -> list[Cells]:
    """Part (c): the first three domains, the new one, all four, and what the first three lost."""
    table = [["", "first three", "bytecode", "all four", "lost on the first three"]]
    before: dict[int, float] = {}
    for method in adding.methods():
        old, new = results.bits(method.name, OLD), results.bits(method.name, composing.DOMAINS[3:])
        if not old:
            continue
        first = method.name in adding.BEFORE
        before = old if first else before
        lost = [] if first else [old[seed] - before[seed] for seed in old if seed in before]
        four = results.bits(method.name)
        table.append([method.name, *map(_spread, (old.values(), new.values(), four.values(), lost))])
    return table


def markdown(log: Log) -> dict[str, str]:
    """All tables by name."""
    results = Results(log)
    names = [method.name for method in joint.methods()]
    tables = {
        "joint": joint_table(results, names[:3]),
        "grid": grid_table(results),
        "changed": joint_table(results, names[3:]),
        "composing": composing_table(results),
        "adding": adding_table(results),
    }
    return {name: _lines(cells) for name, cells in tables.items()} | {"run": _run(log)}


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put the tables between the markers of a page: `<!-- joint -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1\n{table}\n\2", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def _run(log: Log) -> str:
    """Where and how long the rows ran."""
    machines = "; ".join(sorted({row["machine"] for row in log.rows}))
    dates = " to ".join(sorted({row["date"] for row in log.rows}))
    minutes = sum(row["seconds"] for row in log.rows) / 60
    return f"{len(log.rows)} rows, {minutes:.0f} minutes of training; {machines}; {dates}.\n"


def _lines(cells: list[Cells]) -> str:
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (cells[0], rule, *cells[1:]))


def _spread(values: Iterable[float], percent: bool = False) -> str:
    """The mean, and the least and greatest of several values."""
    values = list(values)
    form = (lambda v: f"{100 * v:.0f} %") if percent else (lambda v: f"{v:.3f}")
    if len(values) < 2:
        return form(values[0]) if values else ""
    return f"{form(mean(values))} ({form(min(values))} to {form(max(values))})"


def _seeds_of_all(by_seed: Sequence[dict[int, float]]) -> set[int]:
    return set.intersection(*(set(bits) for bits in by_seed))
