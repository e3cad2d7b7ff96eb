"""The benchmark of serving, as far as it needs no vLLM."""

import random
from typing import Any

import torch

from benchmarks.serving import report
from benchmarks.serving.labels import LABELS, TARGETS
from benchmarks.serving.rows import ROWS, mean_error, options_of, write_models


def test_percentiles_are_measured_values() -> None:
    values = random.sample(range(1, 101), 100)
    assert [report.percentile(values, p) for p in (0, 1, 50, 90, 99, 100)] == [1, 1, 50, 90, 99, 100]
    assert report.percentile([7.0], 50) == 7.0


def test_a_row_is_compared_with_the_base_in_its_own_mode_round_by_round() -> None:
    speeds = {"base": [10.0, 20.0], "base-eager": [9.0], "lmoe": [5.0, 5.0], "lmoe-eager": [3.0]}
    assert report.costs(speeds, "lmoe") == [2.0, 4.0]
    assert report.costs(speeds, "lmoe-eager") == [3.0]
    assert report.costs(speeds, "base") == []


def test_the_tables_have_what_was_measured() -> None:
    def clocks(*values: float) -> dict[str, list[float]]:
        return {"cpu": list(values), "wall": [value / 2 for value in values]}

    results: dict[str, Any] = {
        "environment": {
            "device": "a CPU", "threads": 1, "packages": {"torch": "2"}, "system": "Linux", "commit": "abc",
            "date": "today", "load": 1.5, "on_cpu": True,
        },
        "load_at_end": 2.5, "load_of_server": "4 clients.", "rounds": 2, "checks": ["- good"],
        "speeds": {"decode": {"base": clocks(40, 44), "lmoe": clocks(32, 40), "lora-eager": clocks(7)}},
        "latencies": {"base": {"first token": [0.5, 0.1], "another token": [0.02]}},
    }  # fmt: skip
    text = report.markdown(results)
    assert f"| {LABELS['lmoe']} | 36 (32 to 40), 1.18x |" in text
    assert f"| {LABELS['lmoe']} | 18 (16 to 20), 1.18x |" in text
    assert f"| {LABELS['base']} | 2 | 100 | 500 | 500 | 20 | 20 | 20 |" in text
    assert "These are figures of a CPU" in text
    assert LABELS["lmoe-eager"] not in text  # it was not measured
    results["environment"]["on_cpu"] = False
    assert "CPU time" not in report.markdown(results)


def test_every_row_has_a_label_and_serves_what_was_written(tmp_path: Any) -> None:
    assert list(ROWS) == list(LABELS)
    models = write_models(tmp_path, layers=1, width=64, vocabulary=128)
    tokens = torch.randint(2, 128, (12,)).tolist()
    logits = models["lmoe"](torch.tensor([tokens])).logits[0]
    logprobs = logits.log_softmax(-1)[torch.arange(3, 11), torch.tensor(tokens[4:])].tolist()
    errors = {name: mean_error(model, tokens[:4], tokens[4:], logprobs) for name, model in models.items()}
    assert errors["lmoe"] < 1e-5
    assert min(errors[""], errors["lora"]) > 1e-3
    for row in ROWS.values():
        folder = options_of(row, tmp_path, "cpu").get("hf_overrides", {}).get("lmoe_adapter")
        assert (folder is not None) == (row.adapter == "lmoe")
    assert (tmp_path / "lmoe" / "lmoe_config.json").exists()
    assert len(TARGETS) == 7
