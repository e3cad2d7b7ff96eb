"""Imports run one way, files and functions stay small, and the package works without its optional dependencies."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe_kernels import dispatch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lmoe_kernels"

# Every module of the package, from the top level to the bottom: a module imports only from levels below its own.
LEVELS = [
    {"__init__", "info", "peft", "routing", "vllm"},
    {"auxiliary_trainer", "balancing", "checkpoint", "compilation", "compose", "experts", "fitting", "training"},
    {"auxiliary_hook"},
    {"auxiliary"},
    {"model"},
    {"pretrained"},
    {"peft_interop"},
    {"contents", "reader", "stack_models"},
    {"adapter", "frozen_experts", "lora_adapter", "targets"},
    {"layer"},
    {"layer_options", "mixture", "routers", "stack_group"},
    {"gate", "router_scopes"},
    {"config", "files", "functional", "losses", "running_means", "serving"},
    {"autograd", "stack"},
    {"ops"},
    {"dropout"},
    {"dispatch"},
    {"backends"},
    {"casting", "checks", "reference"},
    {"distributed", "linears", "naming", "options", "products", "quantised", "tracing", "version"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
# The same for the benchmarks, which import the package and tools in addition.
BENCHMARK_LEVELS = [
    {"gpu", "model", "serving", "test_rows"},
    {"__main__"},
    {"defaults", "inspect", "showing"},
    {"measuring"},
    {"rows"},
    {"__init__"},
]
BENCHMARK_LEVEL = {module: level for level, modules in enumerate(BENCHMARK_LEVELS) for module in modules}
# What a backend may import in addition to its own modules.
COMMON = ("lmoe_kernels.casting", "lmoe_kernels.options", "lmoe_kernels.products", "lmoe_kernels.tracing")


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _module(path: Path, package: Path = PACKAGE) -> str:
    """The module or folder right under the package that a file belongs to."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _own_imports(path: Path) -> set[str]:
    """Full names of the package's modules that a file imports."""
    return {name for name in _imports(path) if name.startswith("lmoe_kernels.")}


def test_every_module_has_one_level() -> None:
    assert {_module(path) for path in PACKAGE.rglob("*.py")} == set(LEVEL)
    assert sum(map(len, LEVELS)) == len(LEVEL)


def _assert_one_way(path: Path, package: Path, level: dict[str, int]) -> None:
    """Fail if a file imports a module of its package that is on its own level or above."""
    here = _module(path, package)
    for name in _imports(path):
        root, _, inner = name.partition(".")
        there = inner.partition(".")[0]
        if root == package.name and there in level and there != here:
            assert level[here] < level[there], f"{path.name} imports {name}, which is on the same level or above"


@pytest.mark.parametrize("path", _sources("lmoe_kernels"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    _assert_one_way(path, PACKAGE, LEVEL)


@pytest.mark.parametrize("path", _sources("benchmarks"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_of_the_benchmarks_run_one_way(path: Path) -> None:
    assert _module(path, ROOT / "benchmarks") in BENCHMARK_LEVEL
    assert not {name.partition(".")[0] for name in _imports(path)} & {"tests", "examples"}
    _assert_one_way(path, ROOT / "benchmarks", BENCHMARK_LEVEL)


def test_no_module_of_the_benchmarks_imports_itself_through_others() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in _sources("benchmarks")
    }
    with_code = {name for name, path in modules.items() if path.name != "__init__.py"}
    left = {name: _imports(path) & with_code for name, path in modules.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_backends_import_neither_one_another_nor_anything_above() -> None:
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = ".".join(path.relative_to(ROOT).parts[:3]).removesuffix(".py")
        common = (*COMMON, "lmoe_kernels.reference") if own.endswith(".reference") else COMMON
        for name in _own_imports(path):
            assert name.startswith((own, *common)), f"{path.relative_to(ROOT)} imports {name}"


def test_every_backend_has_the_same_files_and_a_row_in_the_table() -> None:
    folders = {path.name: path for path in (PACKAGE / "backends").iterdir() if (path / "__init__.py").exists()}
    assert folders.keys() == dispatch.BACKENDS.keys()
    for folder in folders.values():
        files = {path.name for path in folder.iterdir()}
        assert {"__init__.py", "availability.py", "forward.py", "backward.py", "dropout.py", "serving.py"} <= files, (
            folder.name
        )


@pytest.mark.parametrize("path", _sources("tools"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_tools_import_neither_tests_nor_benchmarks(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imports(path)} & {"tests", "benchmarks"}


def test_the_reference_imports_torch_and_the_tuples_alone() -> None:
    names = _imports(PACKAGE / "reference.py")
    assert {name for name in names if "." not in name} | {name for name in names if name.startswith("lmoe")} - {
        name for name in names if name.startswith("lmoe_kernels.options.")
    } == {"torch", "lmoe_kernels.options"}


@pytest.mark.parametrize("absent", ["triton", "safetensors", "transformers", "peft"])
def test_the_package_works_without_optional_packages(absent: str) -> None:
    program = f"""
import sys
sys.modules[{absent!r}] = None
import torch, lmoe_kernels as lk
layer = lk.LMoELinear(8, 8, num_experts=2, rank=2)
layer(torch.randn(3, 8)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, torch; before = set(sys.modules); import lmoe_kernels; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True)
    heavy = {"triton", "peft", "transformers", "safetensors", "lmoe_kernels.backends.torch.forward"}
    assert not heavy & set(loaded.stdout.split())


@pytest.mark.parametrize(
    "path", _sources("lmoe_kernels", "benchmarks", "examples", "tests", "tools"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= (120 if kernel else 80), f"{node.name} has {lines} lines"
