"""The examples with a tiny budget, and the commands and code of the README."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lmoe_kernels import lmoe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "examples/three_domains.py", "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    apart, together = results["bits_per_byte"]["apart"], results["bits_per_byte"]["together"]
    first, *_, last = apart
    assert (first, last) == ("frozen model", "one LoRA trained on everything")
    assert set(together) == {"one LoRA", "factors", "outputs"}
    assert all(0 < bits < 9 for by_domain in (*apart.values(), *together.values()) for bits in by_domain.values())
    parameters = results["trained_parameters"]
    assert max(parameters[name] for name in together) / min(parameters[name] for name in together) < 1.02
    assert parameters["router per block, on the prefix"] == 4 * 3 * 128
    shapes = {
        name: (len(of_layer), *torch.tensor(list(of_layer.values())).shape[1:])
        for name, of_layer in results["gates"].items()
    }
    assert list(shapes.values()) == [(28, 3, 8), (28, 3, 3), (4, 3, 3)]
    for of_layer in results["gates"].values():
        use = torch.tensor(list(of_layer.values()))
        torch.testing.assert_close(use.sum(dim=-1), torch.ones(use.shape[:2]))
    saved = {name: cost["saved_bytes_per_token"] for name, cost in results["costs"].items()}
    assert saved["frozen model"] < saved["L-MoE, torch backend"] < saved["loop over 8 PEFT LoRAs"] / 3
    for picture in ("bits.png", "gates.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "From the average to the oracle" in run.stdout
    assert re.search(r"(one LoRA|factors|outputs) wins, [\d.]+ ahead of", run.stdout)
    assert (tmp_path / "adapter" / "lmoe.safetensors").is_file()


def test_demo_is_repeatable_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    model_of_demo = importlib.import_module("study.language_model")
    domains = importlib.import_module("corpus").load_domains()
    trained = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model = model_of_demo.small_llama()
        list(model_of_demo.training(model, domains, 1, seed))
        trained.append(model.lm_head.weight.detach())
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def run_example(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_hf_trainer(tmp_path: Path) -> None:
    run = run_example("hf_trainer.py", tmp_path, "--tiny")
    assert run.returncode == 0, run.stderr
    assert "the loaded model gives the same logits" in run.stdout
    before, after = zip(*re.findall(r"^(?:English|Python|C) +([\d.]+) +([\d.]+) ", run.stdout, re.MULTILINE), strict=True)
    assert len(before) == 3
    assert all(0 < float(bits) < 8.5 for bits in (*before, *after))
    assert before != after


def test_compose_adapters_composes_and_exports(tmp_path: Path) -> None:
    run = run_example("compose_adapters.py", tmp_path, "--tiny", "--out", ".")
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


def test_trl_sft(tmp_path: Path) -> None:
    run = run_example("trl_sft.py", tmp_path, "--steps", "6")
    if find_spec("trl") is None:
        assert run.returncode == 1
        assert re.fullmatch(r"trl_sft\.py: .*trl.* must be installed: pip install trl\n", run.stderr)
        pytest.skip("TRL is not installed; without it the example says how to install it")
    assert run.returncode == 0, run.stderr
    assert "the loaded model gives the same logits" in run.stdout
    first, last = re.findall(r"^loss ([\d.]+) at first, ([\d.]+) at last$", run.stdout, re.MULTILINE)[0]
    assert float(last) < float(first)


def test_routing_report_writes_statistics_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    importlib.import_module("routing_report").main(["--tiny", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "routing.json", "routing.safetensors"]
    readable = json.loads((tmp_path / "routing.json").read_text(encoding="utf-8"))
    assert len(readable["summary"]) == 21
    tokens = 4 * 4 * 97 + 2 * (96 + 32 + 15)  # training; the windows and what generate reads
    for of_layer in readable["summary"].values():
        assert {name: of_label["tokens"] for name, of_label in of_layer["labels"].items()} == dict.fromkeys(
            ("English", "Python", "C"), tokens
        )
    assert [of_step["step"] for of_step in readable["drift"]] == [1, 2, 3, 4]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 5
    assert "Python by expert" in page
    assert "effective experts" in capsys.readouterr().out


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_readme_code_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[number]
    exec(compile(code, f"README.md, block {number}", "exec"), {})


def test_readme_commands_exist() -> None:
    shell = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", README, flags=re.DOTALL))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", shell, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
    for module in re.findall(r"python -m (\S+)", shell):
        assert (ROOT / module.replace(".", "/")).exists() or (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    first, second = re.findall(r"^make (\w+)", shell, flags=re.MULTILINE)[:2]
    assert (first, second) == ("demo", "test")


def test_readme_number_of_the_two_mixings() -> None:
    """The README says how much the mixings differ; the code here computes that number."""
    stated = float(re.findall(r"differ by ([\d.]+)\s+of their norm", README)[0])
    torch.manual_seed(0)
    x, a, b = torch.randn(64, 256), torch.randn(8, 16, 256) / 16, torch.randn(8, 16, 256) / 4
    gate = torch.randn(8, 256) / 16
    factors, outputs = (lmoe(x, a, b, gate_weight=gate, mixing=mixing) for mixing in ("factors", "outputs"))
    measured = ((factors - outputs).norm() / outputs.norm()).item()
    assert abs(measured - stated) < 0.005
