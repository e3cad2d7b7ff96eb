"""The folders of the benchmarks import in one direction, and no module imports itself through others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = ["rows", "measuring", "showing"]  # each imports from itself and those before it
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "benchmarks").rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The modules of the benchmarks that a file imports, at its top or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name in MODULES and MODULES[name].name != "__init__.py"}


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_from_those_before_it(folder: str) -> None:
    allowed = ORDER[: ORDER.index(folder) + 1]
    for path in (ROOT / "benchmarks" / folder).glob("*.py"):
        for name in imported(path):
            assert name.split(".")[1] in allowed, f"{folder}/{path.name} imports {name}"


def test_there_is_no_circle() -> None:
    left = {name: imported(path) for name, path in MODULES.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_nothing_imports_the_tests() -> None:
    assert "benchmarks.rows.shapes" in MODULES
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.split(".")[0] == "tests" for module in modules), name
