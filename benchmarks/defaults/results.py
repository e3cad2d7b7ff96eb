"""The study's results and their file, which is written after every trial: a run that was stopped continues from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.defaults.trials import Outcome, Settings, Trial

SCHEMA = 1


@dataclass
class Results:
    """The results so far."""

    settings: Settings
    environment: dict[str, object]
    outcomes: list[Outcome] = field(default_factory=list)
    random_tokens: dict[str, list[float]] = field(default_factory=dict)  # by method and scaling, the loss of each seed
    unchanged: dict[str, dict[str, float]] = field(default_factory=dict)  # shares of A, B, gate, by their dtype

    def missing(self, wanted: list[Trial]) -> list[Trial]:
        """The wanted trials that have no outcome yet, each once."""
        known = {outcome.trial for outcome in self.outcomes}
        return [trial for trial in dict.fromkeys(wanted) if trial not in known]


def write(results: Results, path: Path) -> None:
    """Write to another name and rename, so that a reader never sees a partial file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, **asdict(results)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path, settings: Settings, environment: dict[str, object]) -> Results:
    """The results of earlier runs under the same settings; none where there is no file.

    Raises:
        ValueError: the file is not of this study, or has other settings.
    """
    if not path.exists():
        return Results(settings, environment)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        outcomes = [Outcome(**{**outcome, "trial": Trial(**outcome["trial"])}) for outcome in kept.pop("outcomes")]
        of = Settings(**kept.pop("settings"))
        results = Results(of, outcomes=outcomes, **{**kept, "environment": environment})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path.name} must be a file of this study, got {error!r}") from None
    if of != settings:
        raise ValueError(f"{path.name} must be of {settings}, got {of}")
    return results
