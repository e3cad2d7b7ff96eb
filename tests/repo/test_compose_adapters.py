"""The example that composes LoRAs, with a tiny budget."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_composes_and_exports(tmp_path: Path) -> None:
    command = [sys.executable, "examples/compose_adapters.py", "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    bits = results["bits_per_byte"]
    assert list(bits) == [
        "base model",
        *(f"LoRA of {domain}" for domain in ("English", "Python", "C")),
        "average of the three",
        "gates, trained",
        "the right LoRA for each",
    ]
    assert all(0 < value < 9 for by_domain in bits.values() for value in by_domain.values())
    assert bits["gates, trained"] != bits["average of the three"]
    assert results["largest_difference_of_exported_logits"] < 1e-4
    assert results["trained_gate_parameters"] == 4 * 3 * (6 * (128 + 1) + 352 + 1)
    assert "average of the three" in run.stdout
    assert (tmp_path / "mixture" / "lmoe.safetensors").is_file()
    assert (tmp_path / "exported" / "adapter_config.json").is_file()
