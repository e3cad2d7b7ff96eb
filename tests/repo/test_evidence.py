"""The study of what a mixture is worth: its text, its trials, its choices, its tables, and the page that shows them."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lmoe_kernels import lmoe_layers

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "evidence" / "results.jsonl"
PAGE = ROOT / "docs" / "evidence.md"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of examples/. Of the bytecode only a few listings are made."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(importlib.import_module("corpus"), "LISTINGS", 8)
    return importlib.import_module


def kept_row(name: str, seed: int, bits: float | None, **settings: float) -> dict[str, Any]:
    domains = ("English", "Python", "C", "Bytecode")
    return {
        "part": "joint", "name": name, "seed": seed, "settings": settings, "bits": dict.fromkeys(domains, bits),
        "chosen_by": bits, "parameters": 5, "seconds": 60.0, "machine": "a machine", "date": "2026-11-26",
    }  # fmt: skip


def test_bytecode_is_the_same_in_every_run(study: Any) -> None:
    text = study("corpus").load_bytecode()
    listing = bytes(text.validation.tolist())
    assert b"LOAD_CONST" in listing
    assert not re.search(rb" at 0x|frozenset\(\{", listing)
    assert len(text.train) > len(text.validation) > 0


def test_a_tiny_run_is_repeated_from_its_file(study: Any, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = study("evidence")
    names = ["LoRA of C", "uniform average", "a router per block, on the prefix", "and a fourth, ridge router"]
    options = ["--tiny", "--out", str(tmp_path), "--seeds", "0", "--only", *names]
    evidence.main(options)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [*names[:2], *3 * names[2:3], names[3]]
    assert [row["settings"] for row in rows[2:5]] == [{"rate": rate} for rate in (3e-3, 1e-2, 3e-2)]
    assert all(0 < bits < 9 for row in rows for bits in row["bits"].values())
    assert next(row for row in rows if row["name"] == names[2])["parameters"] == 4 * 4 * 128
    assert len(list((tmp_path / "models").glob("lora-*.safetensors"))) == 4

    monkeypatch.setattr(evidence, "Lab", lambda *_: pytest.fail("trained again"))
    evidence.main(options)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)
    assert "| uniform average |" in capsys.readouterr().out
    assert "| uniform average |" in (tmp_path / "tables.md").read_text()


def test_an_unknown_row_is_refused(study: Any, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        study("evidence").main(["--only", "two LoRAs", "--out", str(tmp_path)])
    assert "--only must name rows (see --list), got 'two LoRAs'" in capsys.readouterr().err


def test_windows_that_choose_are_not_those_that_are_reported(study: Any, tmp_path: Path) -> None:
    lab_module = study("study.lab")
    corpus = study("corpus")
    lab = lab_module.Lab(lab_module.TINY, [*corpus.load_domains(), corpus.load_bytecode()], tmp_path, 0, "cpu")
    for domain in lab.domains:
        choosing, judging = (
            {bytes(w.to(torch.uint8).tolist()) for w in windows[domain.name]} for windows in (lab.choosing, lab.judging)
        )
        assert len(choosing) == lab.sizes.chosen_by
        assert len(judging) == lab.sizes.judged
        assert not choosing & judging
        kept = lab.kept(domain)
        assert len(kept.windows) == lab.sizes.kept
        batch = kept.batch(9, 128, torch.Generator())
        assert {tuple(w) for w in batch.tolist()} <= {tuple(w) for w in kept.windows.tolist()}


@torch.no_grad()
def test_composed_experts_are_the_loras(study: Any) -> None:
    """Copies of one LoRA average to that LoRA, and a gate that is nearly 1 picks its own."""
    adapters, base = study("study.adapters"), study("study.language_model").small_llama()
    loras, models = {}, {}
    for name in ("a", "b"):
        models[name] = adapters.one_lora(base, 3, 8.0, seed=len(models))
        for layer in lmoe_layers(models[name]).values():
            layer.lora_b.normal_(std=0.05)
        loras[name] = adapters.experts_of(models[name])
    ids = torch.randint(256, (2, 9))
    expected = {name: model(ids).logits for name, model in models.items()}
    assert (expected["a"] - expected["b"]).abs().max() > 0.1
    copies = adapters.composed(base, {"a": loras["a"], "again": loras["a"]}, 8.0)
    torch.testing.assert_close(copies(ids).logits, expected["a"], rtol=1e-4, atol=1e-4)
    picked = adapters.composed(base, loras, 8.0, gate_bias=True)
    for layer in lmoe_layers(picked).values():
        layer.gate_bias.copy_(torch.tensor([0.0, 30.0]))
        assert not layer.lora_a.requires_grad
        assert not layer.lora_b.requires_grad
    torch.testing.assert_close(picked(ids).logits, expected["b"], rtol=1e-4, atol=1e-4)


def test_the_best_candidate_is_finite_and_known_only_when_all_were_tried(study: Any, tmp_path: Path) -> None:
    log = study("study.log").Log(tmp_path / "results.jsonl")
    candidates = ({"rate": 1.0}, {"rate": 2.0}, {"rate": 3.0})
    log.append(kept_row("x", 0, None, rate=1.0))
    log.append(kept_row("x", 0, 2.5, rate=2.0))
    assert log.best("x", candidates) is None
    log.append(kept_row("x", 0, 2.25, rate=3.0))
    assert log.best("x", candidates) == {"rate": 3.0}
    assert study("study.log").Log(log.path).rows == log.rows


def test_way_to_the_oracle(study: Any, tmp_path: Path) -> None:
    composing, tables = study("study.composing"), study("study.tables")
    log = study("study.log").Log(tmp_path / "results.jsonl")
    for seed, shift in ((0, 0.0), (1, 0.5)):
        for domain in composing.DOMAINS:
            row = kept_row(f"LoRA of {domain}", seed, 4.0 + shift)
            row["bits"][domain] = 2.0 + shift
            log.append(row)
        log.append(kept_row(composing.AVERAGE, seed, 3.0 + shift))
        log.append(kept_row(f"{composing.PREFIX}, {composing.RIDGE}", seed, 2.25 + shift))
    table = {first: rest for first, *rest in tables.composing_table(tables.Results(log))}
    assert table[composing.ORACLE][1:] == ["2.000", "2.500", "", "2.250", "100 %"]
    assert table[composing.ALONE][1:3] == ["3.500", "4.000"]
    assert table[f"{composing.PREFIX}, {composing.RIDGE}"][-1] == "75 % (75 % to 75 %)"


def test_page_shows_the_kept_results(study: Any) -> None:
    tables = study("study.tables").markdown(study("study.log").Log(KEPT))
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        shown = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
        assert shown == [f"\n{table}\n"], f"{name}: run python examples/evidence.py --tables (see the page)"
