"""The table of docs/stacks.md: every test that it names exists, and no stack that is tested is missing."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_stacks import STACKS_AND_PLAIN

PAGE = (Path(__file__).parent.parent / "docs" / "stacks.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][1:]
COLUMNS = ("test_trains", "test_saves", "test_loads_elsewhere", "test_resumes")


def _assert_exists(file: str, test: str) -> None:
    """Whether the file has the test; with a parameter in brackets, that case of it."""
    name, _, parameter = test.rstrip("]").partition("[")
    function = getattr(import_module(f"tests.{file.removesuffix('.py')}"), name, None)
    assert callable(function), f"{file} has no {name}"
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    values = [str(value) for mark in marks for value in mark.args[1]]
    assert not parameter or parameter in values, f"{file}: {test} is none of {values}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_cell_names_a_test_or_says_why_not(row: list[str]) -> None:
    _, file, *cells = row
    assert len(cells) == 4
    for cell in cells:
        if not re.fullmatch(r"not run: .+", cell):
            assert re.fullmatch(r"`test_\w+(\[[^`]+\])?`", cell), cell
            _assert_exists(file.strip("`"), cell.strip("`"))


def test_every_stack_that_is_tested_has_a_row() -> None:
    cells = [cell for row in ROWS for cell in row]
    assert all(f"`{column}[{stack}]`" in cells for stack in STACKS_AND_PLAIN for column in COLUMNS)


def test_the_tests_that_the_text_names_exist() -> None:
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    for test in re.findall(r"`(test_\w+)`", text):
        files = [file for file in ("test_stacks", "test_beside_peft") if hasattr(import_module(f"tests.{file}"), test)]
        assert files, test
