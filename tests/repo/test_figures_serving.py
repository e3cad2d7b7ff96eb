"""The figures of docs/serving.md are those of the results."""

import json
from typing import Any

from tests.repo.test_docs import H200, PAGES, cells, shown

PAGE = PAGES["serving.md"]
LAYERS = {"q, k, v": ("qkv", 1), "gate, up": ("gate_up", 1), "down": ("down", 1), "q, k, v of four adapters": ("qkv", 4)}
COLUMNS = ("frozen", "triton", "cuda", "torch", "separate calls, triton")
ROWS: list[dict[str, Any]] = [json.loads(line) for line in (H200 / "stacked.jsonl").read_text(encoding="utf-8").splitlines()]


def test_table_of_the_stacked_operation_is_that_of_the_h200() -> None:
    table = cells("| us | frozen product", PAGE)
    assert len(table) == 10
    for label, figures in table.items():
        name, _, tokens = label.rpartition(", T=")
        wanted = (*LAYERS[name], int(tokens))
        times = next(row for row in ROWS if (row["layer"], row["adapters"], row["tokens"]) == wanted)[
            "us in a graph: median, least, most"
        ]
        assert figures == [shown(times[column][0]) if column in times else "" for column in COLUMNS], label


def test_the_share_of_the_host_is_that_of_the_h200() -> None:
    ranges = []
    for column in COLUMNS[1:]:
        times = [row["us of the host"][column] for row in ROWS if row["tokens"] == 1 and row["adapters"] == 1]
        ranges.append(f"{min(times):.0f} to {max(times):.0f}")
    triton, cuda, torch, separate = ranges
    expected = f"{triton} us for a call with one token on `triton`, {cuda} on `cuda`, {torch} on `torch`, and {separate} for"
    assert expected in " ".join(PAGE.split())
