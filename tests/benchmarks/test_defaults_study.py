"""The study behind the defaults: its plan, its choices, the files that it refuses, and a tiny run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.defaults import __main__ as cli
from benchmarks.defaults import plan, report
from benchmarks.defaults.plan import FULL, QUICK, default_scaling, method_of, point
from benchmarks.defaults.probes import unchanged
from benchmarks.defaults.results import Results
from benchmarks.defaults.trials import Lab, Outcome, Settings, likeness
from benchmarks.rows.shapes import Shape, make_inputs
from benchmarks.rows.table import rows
from lmoe_kernels import LMoELinear, lmoe_layers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(cli.BRIEF, tmp_path_factory.mktemp("base"))


def outcomes() -> list[Outcome]:
    """The whole grid: a larger scaling is better on the windows for choosing, and worse on those that are reported."""
    return [Outcome(trial, -trial.scaling, trial.scaling, None) for trial in FULL.tuning()]


def test_a_tiny_run_writes_its_files_and_a_second_run_trains_nothing(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quick", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    asked = {
        trial for _, trials in QUICK.stages(cli.read(tmp_path / "results.json", cli.BRIEF, {}).outcomes) for trial in trials
    }
    assert len(written["outcomes"]) == len(asked)
    assert all(0 < outcome["reported"] < 9 for outcome in written["outcomes"])
    assert written["unchanged"]["bf16"]["lora_a"] > 0.5
    assert (tmp_path / "defaults.png").read_bytes().startswith(b"\x89PNG")
    assert "## Tuned on both sides" in (tmp_path / "results.md").read_text()
    assert "learning rate and scaling: " in capsys.readouterr().err

    monkeypatch.setattr(Lab, "run", lambda self, trial: pytest.fail(f"trained again: {trial}"))
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text())["outcomes"] == written["outcomes"]


def test_all_methods_train_as_many_parameters(lab: Lab) -> None:
    counts = []
    for method in plan.METHODS:
        model = lab.adapted(point(method, 1.0, 1e-3))
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert max(counts) / min(counts) < 1.02


def test_trials_of_one_seed_are_the_same_and_of_another_not(lab: Lab) -> None:
    trial = point("factors", 8.0, 1e-2)
    assert lab.run(trial) == lab.run(trial)
    assert lab.run(trial).reported != lab.run(replace(trial, seed=1)).reported


def test_no_window_both_chooses_and_is_reported(lab: Lab) -> None:
    for chosen, reported in zip(lab.choosing, lab.reporting, strict=True):
        seen = {tuple(window) for window in chosen.tolist()}
        assert len(seen) == len(reported) == cli.BRIEF.judged
        assert not seen & {tuple(window) for window in reported.tolist()}


def test_the_best_is_chosen_on_the_windows_for_it_and_never_one_that_diverged() -> None:
    known = outcomes()
    assert FULL.best(known, "outputs").trial.scaling == 128
    assert method_of(FULL.best(known, "LoRA").trial) == "LoRA"
    known = [replace(o, chosen_by=None) if o.trial.scaling == 128 else o for o in known]
    assert FULL.best(known, "outputs").trial.scaling == 64


def test_what_tuning_chose_is_repeated_on_every_other_seed() -> None:
    repeated = list(FULL.repeats(outcomes()))
    for method in plan.METHODS:
        trial = FULL.best(outcomes(), method).trial
        assert {replace(trial, seed=seed) for seed in FULL.seeds[1:]} <= set(repeated)


def test_a_trial_runs_once() -> None:
    trial = point("LoRA", 1.0, 1e-3)
    results = Results(Settings(), {}, [Outcome(trial, 1.0, 1.0, None)])
    other = replace(trial, seed=5)
    assert results.missing([trial, other, other]) == [other]


def test_a_diverged_trial_is_shown_and_its_mean_too() -> None:
    known = [replace(o, reported=None) if o.trial == point("LoRA", 16.0, 1e-2) else o for o in outcomes()]
    table = report.Tables(Results(Settings(), {}, known), FULL).scalings()
    header, *body = table
    row = next(row for row in body if row[:2] == ["LoRA", "0.01"])
    assert row[header.index("scaling 16")] == "diverged"
    assert sum("diverged" in row for row in table) == 1


def test_the_default_is_marked_in_the_table() -> None:
    table = report.Tables(Results(Settings(), {}, outcomes()), FULL).scalings()
    header, *body = table
    for method, _, *cells in body:
        marked = [head for head, cell in zip(header[2:], cells, strict=True) if cell.startswith("**")]
        assert marked in ([f"scaling {default_scaling(method):g}"], [])


def test_likeness_is_one_for_equal_experts_and_zero_for_orthogonal_ones() -> None:
    layer = LMoELinear(4, 3, num_experts=3, rank=1)
    with torch.no_grad():
        layer.lora_b.copy_(torch.eye(3)[:, None])
        assert likeness(layer) == 0
        layer.lora_b.copy_(torch.tensor([1.0, 2.0, 2.0]).expand(3, 1, 3) * torch.tensor([1.0, 3.0, 0.1])[:, None, None])
    assert likeness(layer) == pytest.approx(1.0)


def test_small_steps_are_lost_in_bf16_and_not_in_fp32(lab: Lab) -> None:
    assert unchanged(lab, torch.bfloat16, (0,))["lora_a"] > 0.5
    assert max(unchanged(lab, None, (0,)).values()) < 0.01


def test_one_lora_has_no_gate_to_train(lab: Lab) -> None:
    model = lab.adapted(point("LoRA", 1.0, 1e-3))
    assert not any(layer.gate_weight.requires_grad for layer in lmoe_layers(model).values())


@pytest.mark.parametrize(
    "content, message",
    [
        ("not JSON", "--out: results.json must be a file of this study, got JSONDecodeError"),
        ('{"schema": 0}', "--out: results.json must be a file of this study, got ValueError('another schema')"),
        ("[]", "--out: results.json must be a file of this study, got "),
    ],
)
def test_another_file_is_refused_and_stays(content: str, message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit):
        cli.main(["--quick", "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("results.json", content)]


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path, capsys) -> None:
    cli.write(Results(Settings(steps=7), {}), tmp_path / "results.json")
    with pytest.raises(SystemExit):
        cli.main(["--quick", "--out", str(tmp_path)])
    assert "--out: results.json must be of Settings(base_steps=2, steps=2," in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--quick", "--out", __file__])
    assert f"--out must be a folder that can be written, got {__file__!r}: File exists" in capsys.readouterr().err


def test_the_row_of_fp32_experts_keeps_its_activations_in_bf16() -> None:
    inputs = make_inputs(Shape(tokens=5, in_features=16, out_features=24, num_experts=2, rank=2, dtype="bfloat16"), CPU)
    step = rows()["torch-fp32"].build(inputs, "layer")
    dtypes = {grad_input.name: grad_input.tensor.dtype for grad_input in step.grad_inputs}
    assert dtypes.pop("x") == step.forward().dtype == torch.bfloat16
    assert dtypes == dict.fromkeys(("lora_a", "lora_b", "gate_weight"), torch.float32)
    in_float32 = rows()["torch-fp32"].why_not(replace(inputs.shape, dtype="float32"), CPU)
    assert in_float32 == "the same as torch in float32"
