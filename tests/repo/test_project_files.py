"""README (figures, links, extras), CITATION.cff, the CI workflow, the issue forms and examples/minimal.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmoe_kernels import __version__

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later")
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RESULTS = json.loads((ROOT / "benchmarks/results/intel-xeon-2-cores/results.json").read_text(encoding="utf-8"))

# The rows of the README's table of costs: a row of the benchmarks, and its label.
ROWS = {
    "peft": "one LoRA (PEFT)",
    "peft-all": "eight active LoRAs (PEFT)",
    "xlora": "X-LoRA's layer, eight LoRAs (PEFT)",
    "loop": "loop over eight LoRAs (LoRAMoE, HydraLoRA, MoLE)",
    "eager": "L-MoE, factored, eager PyTorch",
    "eager-compiled": "L-MoE, factored, `torch.compile`",
    "torch": "L-MoE, backend `torch`",
}
MIXTURES = ("loop", "eager", "eager-compiled", "torch")  # those that train eight experts and a gate
# Its columns: dtype, tokens, phase and field of the benchmarks.
COLUMNS = [
    ("float32", 1024, "forward", "over_frozen"),
    ("float32", 1024, "forward+backward", "over_frozen"),
    ("bfloat16", 1024, "forward", "over_frozen"),
    ("bfloat16", 1024, "forward+backward", "over_frozen"),
    ("float32", 1, "forward", "over_frozen"),
    ("bfloat16", 1, "forward", "over_frozen"),
    ("bfloat16", 1024, "forward+backward", "peak_bytes"),
    ("bfloat16", 1024, "forward+backward", "saved_bytes"),
]


def measured(row: str, dtype: str, tokens: int, phase: str, field: str) -> str:
    """A figure of the benchmarks as the README writes it."""
    shape = {"tokens": tokens, "in_features": 2048, "out_features": 2048, "num_experts": 8, "rank": 16, "dtype": dtype}
    [record] = [
        r
        for r in RESULTS["records"]
        if (r["row"], r["scope"], r["phase"], r["shape"]) == (row, "layer", phase, shape) and r["launch"] == "eager"
    ]
    if field == "peak_bytes":
        return f"{record[field] / 2**20:.1f}"
    return f"{record[field] / tokens:,.0f}" if field == "saved_bytes" else f"{record[field]['median']:.2f}"


def expected_row(row: str) -> str:
    """A line of the table of costs; the best of MIXTURES is bold in each column."""
    cells = []
    for column in COLUMNS:
        cell = measured(row, *column)
        best = min((measured(other, *column) for other in MIXTURES), key=lambda c: float(c.replace(",", "")))
        cells.append(f"**{cell}**" if cell == best and row in MIXTURES else cell)
    return f"| {ROWS[row]} | {' | '.join(cells)} |"


@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_costs_shows_the_results(row: str) -> None:
    assert expected_row(row) in README


def test_the_sentence_about_costs_agrees_with_the_table() -> None:
    times = [c for c in COLUMNS if c[-1] == "over_frozen"]
    ours, eager = ([measured(row, *column) for column in times] for row in ("torch", "eager"))
    words = ("none", "one", "two", "three", "four", "five", "six")
    ahead, behind = (words[sum(map(str.__lt__, *pair))] for pair in ((ours, eager), (eager, ours)))
    ties = words[sum(a == b for a, b in zip(ours, eager, strict=True))]
    text = " ".join(README.split())
    assert f"eager PyTorch is slower in {ahead}, ties with it in {ties} and is faster in {behind}: at T=1" in text
    assert f"it takes {eager[4]} and {eager[5]} times the frozen linear's time, ours {ours[4]} and {ours[5]}" in text
    best = [[row for row in MIXTURES if measured(row, *c) == min(measured(other, *c) for other in MIXTURES)] for c in times]
    alone, shared = (words[sum("torch" in rows and (len(rows) == 1) == one for rows in best)] for one in (True, False))
    assert f"fastest of the four in {alone} of the six times" in text
    assert shared == "one", "and shares a third"
    assert "shares a third" in text


def test_the_bullets_show_the_results() -> None:
    text = " ".join(README.split())
    saved, peak = ({row: measured(row, *COLUMNS[i]) for row in ("torch", "loop")} for i in (-1, -2))
    assert (
        f"keeps {saved['torch']} bytes a token for the backward pass; the loop over eight LoRAs keeps {saved['loop']}"
        in text
    )
    assert f"allocate {peak['torch']} MiB; the loop allocates {peak['loop']} MiB" in text


def test_local_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert any(link.endswith(".svg") for link in links)
    for link in links:
        if not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def test_the_table_of_extras_is_that_of_pyproject() -> None:
    shown = dict(re.findall(r'^\| `pip install "\.\[(\w+)\]"` \| ([^|]+) \|', README, flags=re.MULTILINE))
    for extra, packages in shown.items():
        assert set(packages.split(", ")) == {re.split("[><=]", p)[0] for p in PROJECT["optional-dependencies"][extra]}
    assert {"save", "demo"} <= set(shown)
    [torch] = PROJECT["dependencies"]
    assert f"torch {torch.removeprefix('torch>=')} or later" in README


def test_every_distributed_source_names_its_licence() -> None:
    sources = [path for folder in ("lmoe_kernels", "csrc") for path in (ROOT / folder).rglob("*") if path.is_file()]
    sources = [path for path in sources if path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh")]
    assert len(sources) > 50
    unmarked = [
        path.relative_to(ROOT)
        for path in [*sources, ROOT / "setup.py"]
        if "SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8").partition("\n")[0]
    ]
    assert unmarked == []


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_names_this_version() -> None:
    citation = _yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert citation["type"] == "software"
    [reference] = citation["references"]
    assert reference["identifiers"] == [{"type": "other", "value": "arXiv:2510.17898"}]


def test_the_workflow_runs_what_ci_runs_and_nothing_else() -> None:
    [job] = _yaml(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    [python] = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert python == "3.11"  # a string: YAML reads 3.10 as 3.1


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_ask_for_the_report_of_info(form: str) -> None:
    content = _yaml(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= set(content)
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    [info] = [field for field in content["body"] if "python -m lmoe_kernels.info" in str(field)]
    assert info["type"] == "textarea"


def test_the_minimal_example(tmp_path: Path) -> None:
    path = ROOT / "examples" / "minimal.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "the loaded model gives the same logits" in run.stdout
    assert {"lmoe.safetensors", "lmoe_config.json", "model.safetensors"} <= {f.name for f in (tmp_path / "out").iterdir()}
