"""The results of the study: a file of JSON lines, to which every finished row is appended."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = Mapping[str, float]  # what is tuned, such as the learning rate
Row = dict[str, Any]
TUNING_SEED = 0  # the candidates' settings are tried with this seed


@dataclass
class Log:
    """The finished rows of a file, which need not exist yet."""

    path: Path
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def append(self, row: Row) -> None:
        """Keep a finished row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def find(self, name: str, seed: int, settings: Settings) -> Row | None:
        """The row with this name, seed and settings."""
        return next((row for row in self.seeds(name, settings) if row["seed"] == seed), None)

    def seeds(self, name: str, settings: Settings) -> list[Row]:
        """The rows of all seeds, by seed."""
        rows = [row for row in self.rows if row["name"] == name and row["settings"] == dict(settings)]
        return sorted(rows, key=lambda row: row["seed"])

    def best(self, name: str, candidates: tuple[Settings, ...]) -> Settings | None:
        """The candidate with the lowest loss on the windows that choose; None where one of them has not been tried."""
        tried = [self.find(name, TUNING_SEED, settings) for settings in candidates]
        if len(candidates) == 1:
            return candidates[0]
        losses = [row["chosen_by"] if row["chosen_by"] is not None else float("inf") for row in tried if row is not None]
        return candidates[losses.index(min(losses))] if len(losses) == len(candidates) else None
