"""The tables of the H100 in docs/performance.md are those of its results."""

import ast
import json
import re
from statistics import mean
from typing import Any

import pytest

from tests.repo.test_docs import ON_H200, PAGES, PHASES, ROOT, cells, shown

H100 = ROOT / "benchmarks/results/nvidia-h100"
RECORDS = {
    (r["row"], r["scope"], r["phase"], r["tokens"]): r
    for r in map(json.loads, (H100 / "graphs.jsonl").read_text(encoding="utf-8").splitlines()[1:])
}
NAMES = ON_H200 | {"`LMoELinear`": "LMoELinear"}


def lines(pattern: str) -> dict[tuple[str, ...], Any]:
    """What the text file has behind the sizes of its lines."""
    found = re.finditer(pattern + r": (\{.*\})$", (H100 / "host-and-experts.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return {line.groups()[:-1]: ast.literal_eval(line.groups()[-1]) for line in found}


def median(row: str, scope: str, phase: str, tokens: int) -> float:
    return mean(visit["median"] for visit in RECORDS[row, scope, phase, tokens]["visits_us"])


@pytest.mark.parametrize(("scope", "rows"), [("layer", 10), ("delta", 6)])
def test_tables_in_graphs(scope: str, rows: int) -> None:
    table = cells(f"| H100: {scope}, us")
    places = [(scope, phase, tokens) for tokens in (16, 512, 8192) for phase in PHASES]
    if scope == "delta":
        assert table.pop("floor") == [shown(RECORDS[("triton", *place)]["floor_us"]) for place in places]
    assert len(table) == rows
    for label, figures in table.items():
        assert figures == [shown(median(NAMES[label], *place)) for place in places], label


def test_shares_of_the_floor() -> None:
    shares = [RECORDS["triton", "delta", p, 8192]["floor_us"] / median("triton", "delta", p, 8192) for p in PHASES]
    text = " ".join(PAGES["performance.md"].split())
    said = "{:.0f} % of what `triton` takes in the forward, {:.0f} % in the backward and {:.0f} % for both: the chip's"
    assert said.format(*(100 * share for share in shares)) in text


def test_table_of_many_experts() -> None:
    table, times = cells("| many experts, us"), lines(r"^E=(\d+) top_k=(\w+)")
    assert len(table) == 4
    columns = [("32", "2"), ("64", "2"), ("128", "2"), ("32", "None"), ("64", "None")]
    for label, figures in table.items():
        assert figures == [shown(times[key][p][NAMES[label]]) for key in columns for p in (PHASES[0], PHASES[2])], label


def test_table_of_the_host() -> None:
    table, times = cells("| host, us"), lines(r"^T=(\d+) ([\w+]+)")
    assert len(table) == 11
    for label, figures in table.items():
        spread = [times[tokens, p][NAMES[label]] for tokens in ("1", "16", "512") for p in (PHASES[0], PHASES[2])]
        assert figures == [shown(float(text.split()[0])) for text in spread], label
