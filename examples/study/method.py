"""One row of the study's tables: what is trained, and the settings that are tried for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from study.lab import Lab
from study.log import Row, Settings

Part = Literal["joint", "composing", "adding"]


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Args:
        part: which table.
        name: what the row is called, unique in the study.
        run: trains with some settings, and returns the result.
        candidates: the settings that are tried with the tuning seed; the best one is run with the other seeds.
        settings_of: the name of another method, whose chosen settings this one takes.
    """

    part: Part
    name: str
    run: Callable[[Lab, Settings], Row]
    candidates: tuple[Settings, ...] = ({},)
    settings_of: str | None = None
