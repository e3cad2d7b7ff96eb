"""A bug that is put into a copy of the kernels."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tools.emulator.build import CSRC


@dataclass(frozen=True)
class Bug:
    """A change of one place in csrc/, and the message that shows that it was caught.

    The place is found by its code within one function, in a copy without comments. So neither a new comment nor the same
    line in another function makes the place ambiguous.
    """

    name: str
    file: str
    function: str  # the part of its signature that ends with the opening parenthesis
    right: str
    wrong: str
    caught_as: str  # a part of the driver's output
    target: str = "quick"
    is_race: bool = False  # ThreadSanitizer finds it, whatever the schedule
    kind: str = "calls"  # of the problems that execute the place
    first_problem: int = 1  # the first of bugs.PROBLEMS of them

    def __str__(self) -> str:
        return self.name

    def plant(self, folder: Path) -> Path:
        """A copy of csrc/ with the bug."""
        csrc = folder / "csrc"
        shutil.copytree(CSRC, csrc)
        path = csrc / self.file
        text = re.sub(r"[ \t]*//.*", "", path.read_text())
        begin, end = self._body(text)
        body, place = text[begin:end], f"{self.name}: {self.function}...)"
        assert body.count(self.right) == 1, f"{place} contains {self.right!r} {body.count(self.right)} times"
        path.write_text(text[:begin] + body.replace(self.right, self.wrong) + text[end:])
        return csrc

    def _body(self, text: str) -> tuple[int, int]:
        """The positions where the function's body begins and ends."""
        count = text.count(self.function)
        assert count == 1, f"{self.name}: {self.file} contains {self.function!r} {count} times"
        opened = re.compile(r"\{\s").search(text, text.index(self.function))
        assert opened, f"{self.name}: {self.function}...) has no body"
        begin, depth = opened.start(), 0
        for at in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return begin, at
        raise AssertionError(f"{self.name}: {self.function}...) does not end")
