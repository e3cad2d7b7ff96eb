"""The documentation: pages, links, code, figures and pictures, and the docstrings that it shows.

In a page, blocks of ```python run, one after another; sketches are ```py.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lmoe_kernels
from benchmarks.measuring.counting import OpCounter
from benchmarks.measuring.limits import Limits
from benchmarks.rows.shapes import Shape, make_inputs
from benchmarks.rows.table import rows
from docs.pictures import draw
from lmoe_kernels.dispatch import BACKENDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
GENERATED = {"changelog.md": ROOT / "CHANGELOG.md"}  # by docs/theme/hooks.py
NAMES = [name for name in lmoe_kernels.__all__ if name != "__version__"]
HEADINGS = ("Args", "Attributes", "Example", "Raises", "Returns", "Semantics", "Yields")
RESULTS = json.loads((ROOT / "benchmarks/results/intel-xeon-2-cores/results.json").read_text(encoding="utf-8"))["records"]
ROWS = {
    "PEFT, one LoRA": "peft", "PEFT, eight active LoRAs": "peft-all", "X-LoRA's layer, eight LoRAs": "xlora",
    "loop over eight LoRAs (LoRAMoE, HydraLoRA, MoLE)": "loop", "loop over LoRAs": "loop",
    "L-MoE, factored, eager PyTorch": "eager", "factored, eager PyTorch": "eager",
    "L-MoE, backend `torch`": "torch", "backend `torch`": "torch",
}  # fmt: skip


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The ids that the site gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def public_objects() -> list[Any]:
    """What __all__ names, and the public members of its classes, as griffe sees them."""
    griffe = pytest.importorskip("griffe")
    package = griffe.load("lmoe_kernels", search_paths=[ROOT], docstring_parser="google", resolve_aliases=True)
    objects = [package[name].final_target for name in NAMES]
    members = [m for o in objects if o.is_class for m in o.members.values() if not m.name.startswith("_")]
    return [o for o in objects + members if o.docstring is not None]


def test_no_public_docstring_loses_a_section() -> None:
    """A heading that griffe does not take for a section is shown as running text."""
    titles = {"parameters": "Args", "attributes": "Attributes", "raises": "Raises", "returns": "Returns", "yields": "Yields"}
    found, lost = Counter[str](), []
    for documented in public_objects():
        written = re.findall(rf"^({'|'.join(HEADINGS)})\b.*:", documented.docstring.value, flags=re.MULTILINE)
        sections = [s for s in documented.docstring.parse("google") if s.kind.value != "text"]
        parsed = [titles.get(s.kind.value, s.title) for s in sections]
        found.update(parsed)
        if parsed != written:
            lost.append(f"{documented.path}: {written} came out as {parsed}")
    assert not lost, "\n".join(lost)
    assert min(found[heading] for heading in ("Args", "Returns", "Raises", "Semantics", "Example")) >= 3


def test_args_of_public_docstrings_are_parameters() -> None:
    unknown = []
    for documented in public_objects():
        if documented.is_class or documented.is_function:
            known = {name.lstrip("*") for parameter in documented.parameters for name in (parameter.name,)}
            sections = [s for s in documented.docstring.parse("google") if s.kind.value == "parameters"]
            names = [argument.name.lstrip("*") for section in sections for argument in section.value]
            unknown += [f"{documented.path}: {name!r}" for name in names if name not in known]
    assert not unknown, "\n".join(unknown)


def test_every_public_name_has_one_place_in_the_api() -> None:
    shown = Counter(re.findall(r"^::: lmoe_kernels\.(\w+)$", "\n".join(PAGES.values()), flags=re.MULTILINE))
    assert shown == Counter(NAMES)


def test_nav_and_pages_are_the_same() -> None:
    def files(entries: list[dict[str, Any]]) -> list[str]:
        values = [value for entry in entries for value in entry.values()]
        return [file for value in values for file in (files(value) if isinstance(value, list) else [value])]

    nav = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted([*PAGES, *GENERATED])


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python\n" in text])
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    dtype = torch.get_default_dtype()
    try:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)):
            exec(compile(code, f"{page}, block {number}", "exec"), names)
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z]\w*)", PAGES[page], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    for module in re.findall(r"python -m (?!vllm\.)([\w.]+)", PAGES[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"python -m {module}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        assert "://" not in link, f"{link}: pages are read without a network too"
        file, _, anchor = link.partition("#")
        target = (DOCS / page).parent / file if file else DOCS / page
        target = GENERATED.get(file, target)
        assert target.is_file(), link
        if anchor and not anchor.startswith("only-"):
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    drawn = draw.draw(tmp_path)
    kept = sorted(path.name for path in (DOCS / "pictures").glob("*.svg"))
    assert sorted(path.name for path in drawn) == kept
    for path in drawn:
        assert path.read_bytes() == (DOCS / "pictures" / path.name).read_bytes(), f"{path.name}: run `make pictures`"


@pytest.mark.parametrize("row", ["frozen", "peft", "literal", "loop", "eager", "torch"])
def test_formulas_of_bytes_are_those_of_the_operations(row: str) -> None:
    """The difference between 64 and 32 tokens is compared: it does not contain the weights, which all tokens share."""
    sizes = draw.Sizes(I=48, O=80, E=5, R=3)
    limits = Limits(1.0, {"float32": 1.0}, {"float32": 1.0}, 1)

    def count(tokens: int) -> tuple[int, int]:
        inputs = make_inputs(Shape(tokens, *sizes, dtype="float32"), torch.device("cpu"))
        step = rows()[row].build(inputs, "layer")
        with OpCounter(limits, "float32") as forward, torch.no_grad():
            step.forward()
        y = step.forward()
        with OpCounter(limits, "float32") as backward:
            torch.autograd.grad(y, [tensor for tensor, *_ in step.grad_inputs], inputs.dy)
        return forward.bytes, backward.bytes

    few, many = count(32), count(64)
    numbers = tuple((b - a) / 32 / 4 for a, b in zip(few, many, strict=True))
    assert numbers == draw.numbers_moved(row, sizes)
    label = {"frozen": "frozen layer", "peft": "one LoRA (PEFT)", "literal": "definition", "loop": "loop over LoRAs",
             "eager": "factored, eager", "torch": "backend `torch`, fp32"}[row]  # fmt: skip
    for formula, number in zip(cells("| way | forward")[label], numbers, strict=True):
        python = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.strip("`"))
        assert eval(python, {"__builtins__": {}}, sizes._asdict()) == number, formula


def cells(header: str, page: str = PAGES["performance.md"]) -> dict[str, list[str]]:
    """The rows of the table with this header, by their first cell."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
    table = lines[start : start + lines[start:].index("")]
    rows_of_table = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in table]
    return {first: rest for first, *rest in rows_of_table}


def over_frozen(row: str, phase: str, **shape: Any) -> str:
    full = {"in_features": 2048, "out_features": 2048, "num_experts": 8, "rank": 16, **shape}
    wanted = (row, "layer", phase, full)
    found = next(r for r in RESULTS if (r["row"], r["scope"], r["phase"], r["shape"]) == wanted)
    return f"{found['over_frozen']['median']:.2f}"


def test_performance_table_is_that_of_the_results() -> None:
    columns = [
        ("forward", "float32", 1024), ("forward+backward", "float32", 1024), ("forward", "bfloat16", 1024),
        ("forward+backward", "bfloat16", 1024), ("forward", "float32", 1), ("forward", "bfloat16", 1),
    ]  # fmt: skip
    table = cells("| | fp32 T=1024 forward")
    assert len(table) == 6
    for label, figures in table.items():
        assert figures == [over_frozen(ROWS[label], phase, dtype=dtype, tokens=tokens) for phase, dtype, tokens in columns]


def test_table_over_tokens_is_that_of_the_results() -> None:
    table = cells("| eager / `torch` | T=1")
    assert len(table) == 6
    for label, figures in table.items():
        dtype, phase = label.split(", ")
        shown = {"fp32": "float32", "bf16": "bfloat16"}[dtype], phase.replace("both", "forward+backward")
        expected = [
            " / ".join(over_frozen(row, shown[1], dtype=shown[0], tokens=tokens) for row in ("eager", "torch"))
            for tokens in (1, 16, 64, 1024)
        ]
        assert figures == expected, label


def test_table_over_experts_is_that_of_the_results() -> None:
    table = cells("| experts | 1")
    assert len(table) == 3
    for label, figures in table.items():
        measured = [
            over_frozen(ROWS[label], "forward+backward", dtype="float32", tokens=256, num_experts=experts)
            for experts in (1, 2, 4, 8, 16, 32, 64)
        ]
        assert figures == measured


MODELLED = {"8192 x 8192": {"in_features": 8192, "out_features": 8192}, "4096 to 14336": {"out_features": 14336},
            "2048 x 2048": {"in_features": 2048, "out_features": 2048}, "E=16, R=64": {"num_experts": 16, "rank": 64},
            **{f"T={tokens}": {"tokens": tokens} for tokens in (1, 16, 64, 512, 4096, 8192, 16384)}}  # fmt: skip


def test_table_of_the_model_is_that_of_its_results() -> None:
    folder, table = ROOT / "benchmarks/results/model", cells("| H100 | forward: floor")
    before, now = (json.loads((folder / name).read_text(encoding="utf-8"))["rows"] for name in ("before.json", "model.json"))
    assert table.keys() == MODELLED.keys()
    for label, figures in table.items():
        shape = {"tokens": 8192, "in_features": 4096, "out_features": 4096, "num_experts": 8, "rank": 16, **MODELLED[label]}
        wanted = {"chip": "H100", "shape": shape | {"dtype": "bfloat16"}}
        expected = []
        for direction in ("forward", "backward"):
            old, new = (
                next(row for row in rows if row.items() >= (wanted | {"direction": direction}).items())
                for rows in (before, now)
            )
            times = [new["floor_us"], old["cuda_us"], new["cuda_us"], new["torch_us"]]
            expected += [f"{time:.1f}" for time in times]
            expected.insert(-1, f"{100 * new['floor_us'] / new['cuda_us']:.0f} %")
        assert figures == expected, label


H200 = ROOT / "benchmarks/results/nvidia-h200"
ON_H200 = {
    "the frozen linear": "frozen", "PEFT, one LoRA": "peft", "PEFT, one LoRA in fp32 (its default)": "peft-fp32",
    "one LoRA in unsloth's order": "unsloth", "PEFT, one LoRA, `torch.compile`": "peft-compiled",
    "L-MoE, factored, eager PyTorch": "eager", "L-MoE, factored, `torch.compile`": "eager-compiled",
    "backend `torch`": "torch", "backend `triton`": "triton", "backend `cuda`": "cuda",
    "backend `triton`, fp32 experts": "triton-fp32", "backend `cuda`, fp32 experts": "cuda-fp32",
}  # fmt: skip
PHASES = ("forward", "backward", "forward+backward")
Tables = dict[tuple[Any, ...], dict[str, Any]]


def tables_of_h200() -> tuple[Tables, Tables]:
    """The first tables of the run, and those after them, which measure compiled rows next to some of the first rows."""
    first, second = Tables(), Tables()
    for record in json.loads((H200 / "results.json").read_text(encoding="utf-8"))["records"]:
        sizes = tuple(record["shape"][key] for key in ("in_features", "out_features", "tokens"))
        key = (record["row"], record["scope"], record["phase"], record["launch"], *sizes)
        (second if second or key in first else first)[key] = record
    return first, second


def on_h200(row: str, scope: str, phase: str, tokens: int, launch: str = "graph", features: tuple = (4096, 4096)) -> str:
    """A time in microseconds, with a mark if it is of a second table in which the frozen linear had another time."""
    key = (row, scope, phase, launch, *features, tokens)
    first, second = tables_of_h200()
    for table, mark in ((first, ""), (second, "†" if tokens == 8192 else "")):
        seconds = table.get(key, {}).get("seconds")
        if seconds is not None:
            return shown(1e6 * seconds["median"]) + mark
    return "not captured" if key in first else ""


def shown(microseconds: float) -> str:
    return f"{microseconds:.{1 if microseconds < 100 else 0}f}"


@pytest.mark.parametrize("scope", ["layer", "delta"])
def test_tables_of_the_h200_are_those_of_its_results(scope: str) -> None:
    table = cells(f"| {scope}, us")
    if scope == "delta":
        first, _ = tables_of_h200()
        floors = [
            first["triton", scope, phase, "graph", 4096, 4096, tokens]["floor_seconds"]
            for tokens in (16, 512, 8192)
            for phase in PHASES
        ]
        assert table.pop("floor") == [shown(1e6 * floor) for floor in floors]
    assert len(table) == {"layer": 12, "delta": 6}[scope]
    for label, figures in table.items():
        assert figures == [
            on_h200(ON_H200[label], scope, phase, tokens) for tokens in (16, 512, 8192) for phase in PHASES
        ], label


def test_table_of_other_layers_on_the_h200_is_that_of_the_results() -> None:
    table = cells("| T=8192, us")
    assert len(table) == 7
    for label, figures in table.items():
        shapes = ((2048, 2048), (8192, 8192), (4096, 14336))
        assert figures == [
            on_h200(ON_H200[label], "layer", phase, 8192, features=features)
            for features in shapes
            for phase in ("forward", "forward+backward")
        ], label


def test_table_of_eager_mode_on_the_h200_is_that_of_the_results() -> None:
    table = cells("| eager, us")
    assert len(table) == 7
    for label, figures in table.items():
        assert figures == [on_h200(ON_H200[label], "layer", "forward+backward", T, "eager") for T in (16, 512, 8192)], label


def test_table_of_the_readme_is_that_of_the_h200() -> None:
    table = cells("| | T=16 forward", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(table) == 7
    for label, figures in table.items():
        row = ON_H200[label if label in ON_H200 else label.removeprefix("L-MoE, ")]
        assert figures == [on_h200(row, "layer", phase, T) for T in (16, 512, 8192) for phase in PHASES[:2]], label


def test_shares_of_the_floor_are_those_of_the_results() -> None:
    """The floor's share of the delta's time, at the copy's bandwidth, and the largest of all."""
    first, _ = tables_of_h200()
    share = {key: 100 * r["floor_seconds"] / r["seconds"]["median"] for key, r in first.items() if r["seconds"]}
    found = {
        row: [f"{share[row, 'delta', phase, 'graph', 4096, 4096, 8192]:.0f} %" for phase in PHASES]
        for row in ("triton", "cuda")
    }
    text = " ".join(PAGES["performance.md"].split())
    forward, backward, both = found["triton"]
    assert f"{forward} of what `triton` takes in the forward, {backward} in the backward and {both} for both" in text
    assert "of what `cuda` takes it is {}, {} and {}".format(*found["cuda"]) in text
    ours = {key: value for key, value in share.items() if key[0] in BACKENDS and key[1] == "delta"}
    best = max(ours, key=ours.__getitem__)
    assert best == ("triton", "delta", "forward", "graph", 8192, 8192, 8192)
    assert f"the best is {ours[best]:.0f} %, a forward of 8192 x 8192 with `triton`" in text


def test_table_of_the_model_against_the_measurement() -> None:
    measured, name = {}, ""
    for line in (H200 / "kernels-before.txt").read_text(encoding="utf-8").splitlines():
        name = line if re.match(r"\d+ -> ", line) else name
        if line.startswith("    graph "):
            direction, *times = line.split()[1:]
            measured[name, direction] = dict(zip(times[::2], map(float, times[1::2]), strict=True))
    rows_of_model = json.loads((ROOT / "benchmarks/results/model/model.json").read_text(encoding="utf-8"))["rows"]
    table, ratios = cells("| model / measured, us"), []
    assert table.keys() == MODELLED.keys() - {"T=16384"}
    for label, figures in table.items():
        shape = {"tokens": 8192, "in_features": 4096, "out_features": 4096, "num_experts": 8, "rank": 16, **MODELLED[label]}
        title = "{in_features} -> {out_features}, T={tokens}, E={num_experts}, R={rank}, bf16".format(**shape)
        expected = []
        for direction in ("forward", "backward"):
            wanted = {"chip": "H200", "shape": shape | {"dtype": "bfloat16"}, "direction": direction}
            modelled = next(row for row in rows_of_model if row.items() >= wanted.items())
            for backend in ("cuda", "torch"):
                times = modelled[f"{backend}_graph_us"], measured[title, direction][backend]
                expected.append("{:.1f} / {:.1f}".format(*times))
                ratios += [times[1] / times[0]] * (backend == "cuda")
        assert figures == expected, label
    assert f"takes {min(ratios):.1f} to {max(ratios):.1f} times as long as modelled" in PAGES["performance.md"]


def test_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="requirements-docs.txt is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    elsewhere = re.compile(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="?(?:https?:)?//')
    for page in (tmp_path / "site").rglob("*.html"):
        assert not elsewhere.search(page.read_text(encoding="utf-8")), page
    mathematics = (tmp_path / "site" / "mathematics" / "index.html").read_text(encoding="utf-8")
    assert mathematics.count('<svg role="img"') == PAGES["mathematics.md"].count("$$") / 2
    assert (tmp_path / "site" / "results" / "intel-xeon-2-cores" / "peers.png").is_file()
