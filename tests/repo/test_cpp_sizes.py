"""C++ and CUDA sources stay small: lines of a file and of a function, parameters, cyclomatic complexity."""

import re
from pathlib import Path

import lizard
import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 80, 120
PARAMETERS, COMPLEXITY = 8, 20
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
SOURCES = sorted(path for folder in ("csrc", "tools") for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
KERNEL = re.compile(r"__global__\s+void(?:\s+__launch_bounds__\([^{;]*?\))?\s+(\w+)\(")


def violations(name: str, text: str) -> list[str]:
    """Everything in a source text that is too large, and every kernel that lizard does not find."""
    found = []
    if len(text.splitlines()) > FILE_LINES:
        found.append(f"{name} has {len(text.splitlines())} lines, at most {FILE_LINES}")
    functions = lizard.analyze_file.analyze_source_code("source.cpp", text).function_list
    kernels = set(KERNEL.findall(text))
    marked = len(re.findall(r"^(?!#).*__global__", text, flags=re.MULTILINE))
    if len(kernels) != marked:
        found.append(f"{name}: {marked} functions are marked __global__, but the kernels read are {sorted(kernels)}")
    names = {function.unqualified_name for function in functions}
    found += [f"{name}: lizard does not find {kernel}" for kernel in sorted(kernels - names)]
    for function in functions:
        most = KERNEL_LINES if function.unqualified_name in kernels else FUNCTION_LINES
        for what, count, limit in (
            ("lines", function.length, most),
            ("parameters", function.parameter_count, PARAMETERS),
            ("paths (cyclomatic complexity)", function.cyclomatic_complexity, COMPLEXITY),
        ):
            if count > limit:
                found.append(f"{name}:{function.start_line}: {function.name} has {count} {what}, at most {limit}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    assert not violations(path.name, path.read_text(encoding="utf-8"))


def test_the_sources_are_found() -> None:
    assert {path.parent.name for path in SOURCES} == {"csrc", "cuda", "emulator"}


KERNEL_TEXT = """
template <class S>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 4 ? 2 : 3) long_kernel(Params p) {{
{body}
}}
"""


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n" * 401, "has 401 lines, at most 400"),
        ("int f() {\n" + "    g();\n" * 79 + "}\n", "f has 81 lines, at most 80"),
        (KERNEL_TEXT.format(body="    g();\n" * 120), "long_kernel has 123 lines, at most 120"),
        ("int f(" + ", ".join(f"int a{i}" for i in range(9)) + ") { return 0; }\n", "f has 9 parameters, at most 8"),
        ("void f(int a) {\n" + "    if (a) g();\n" * 20 + "}\n", "f has 21 paths (cyclomatic complexity), at most 20"),
        ("__global__ static void odd_kernel(Params p) {}\n", "but the kernels read are []"),
    ],
)
def test_sources_that_are_too_large_are_found(text: str, message: str) -> None:
    [found] = violations("seeded.cu", text)
    assert message in found


def test_sources_within_the_bounds_pass() -> None:
    assert not violations("kernel.cu", KERNEL_TEXT.format(body="    g();\n" * 100))
