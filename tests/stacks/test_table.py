"""The tables of docs/stacks.md: every test that they name exists, and no stack that is tested is missing."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.stacks.test_stacks import STACKS_AND_PLAIN

PAGE = (Path(__file__).parents[2] / "docs" / "stacks.md").read_text(encoding="utf-8")
MODULES = {
    "test_stacks": "tests.stacks.test_stacks",
    **{
        name: f"tests.integration.{name}"
        for name in ("test_peft_interop", "test_trainer", "test_trainer_checkpoints", "test_quantised", "test_trl")
    },
    "peft/test_training": "tests.integration.peft.test_training",
    "vllm/test_exactness": "tests.vllm.test_exactness",
}
LINES = [line for line in PAGE.splitlines() if line.startswith("| ")]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if not line.startswith("| stack")]
BY_STACK, OTHERS = [row for row in ROWS if "yes" in row], [row for row in ROWS if "yes" not in row]


def _has(file: str, test: str) -> bool:
    """Whether the file defines the test. It is not imported, because it may be skipped where a package is missing."""
    path = (Path(__file__).parents[2] / MODULES[file].replace(".", "/")).with_suffix(".py")
    return f"\ndef {test}(" in path.read_text(encoding="utf-8")


def test_every_stack_that_is_tested_has_a_row() -> None:
    assert [row[0] for row in BY_STACK] == list(STACKS_AND_PLAIN)
    assert all(row[1:] == ["yes"] * 4 for row in BY_STACK)
    header = next(line for line in LINES if line.startswith("| stack"))
    for test in re.findall(r"`(test_\w+)`", header):
        marks = import_module(MODULES["test_stacks"]).__dict__[test].pytestmark
        assert any(list(mark.args[1]) == list(STACKS_AND_PLAIN) for mark in marks), test


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row[0])
def test_every_other_cell_names_a_test_or_says_why_not(row: list[str]) -> None:
    stack, *cells = row
    assert len(cells) == 4
    assert cells[0] != "the same"
    file = re.search(r"`((?:peft/|vllm/)?test_\w+)\.py`", stack)
    for cell in cells:
        if not re.fullmatch(r"not run: .+|the same", cell):
            test = re.fullmatch(r"`(test_\w+)`", cell)
            assert test is not None, cell
            assert file is not None, stack
            assert _has(file[1], test[1]), cell


def test_the_tests_that_the_text_names_exist() -> None:
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert any(_has(file, test) for file in MODULES), test
