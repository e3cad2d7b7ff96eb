"""The rows: each agrees with its definition, and one that is wrong, breaks or cannot run gets no speed."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks.measuring.group import Group
from benchmarks.measuring.model import Models, Plan
from benchmarks.rows.baselines import per_token
from benchmarks.rows.checks import Checker
from benchmarks.rows.shapes import SCALING, Shape, make_inputs, timed_backends
from benchmarks.rows.table import rows, why_not_timed
from lmoe_kernels import dispatch
from lmoe_kernels.options import Options, Problem, Sizes
from tests.benchmarks.small import BRIEF, CPU, LIMITS, SMALL, records
from tools import calls

HALF = replace(SMALL, dtype="bfloat16")  # rows with fp32 adapters run only where the activations have another dtype
EAGER_ROWS = [name for name, row in rows().items() if not row.compiled and row.why_not(HALF, CPU) is None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EAGER_ROWS)
def test_every_row_computes_its_definition(name: str, dtype: str) -> None:
    pytest.importorskip("peft")
    row = rows()[name]
    for shape in (SMALL, replace(SMALL, tokens=1), replace(SMALL, tokens=130, num_experts=1)):
        checker = Checker(make_inputs(replace(shape, dtype=dtype), CPU), BRIEF.cpu_products)
        for scope in row.scopes:
            assert checker.complaint(row, scope) is None


def test_the_definition_is_the_reference() -> None:
    i = make_inputs(SMALL, CPU).double()
    expected, _ = calls.forward("reference", i.x, i.factors, Options(SCALING), save=False)
    torch.testing.assert_close(per_token(i.x, i.lora_a, i.lora_b, i.gate_weight), expected)


def test_a_check_sees_every_token_or_as_many_as_the_cpu_has_time_for() -> None:
    inputs = make_inputs(SMALL, CPU)
    assert Checker(inputs, 2**33).inputs.shape.tokens == 7
    assert Checker(inputs, 5 * 24 * 40).inputs.shape.tokens == 5


def test_no_speed_for_a_wrong_backend(wrong_backend: str) -> None:
    found = records(["frozen", "torch", wrong_backend])
    assert found["torch"].status == "ok"
    assert found["torch"].seconds is not None
    assert found[wrong_backend].status.startswith("wrong result: gradient of gate_weight: rms error ")
    assert found[wrong_backend].seconds is None
    assert records([wrong_backend], scope="delta")[wrong_backend].seconds is None


def test_a_wrong_backend_fails_the_command(wrong_backend: str, quickly, tmp_path, capsys) -> None:
    sizes = ["--shapes", "24x40", "--tokens", "5", "--experts", "3", "--rank", "2"]
    assert cli.main([*sizes, "--quick", "--rows", f"frozen,{wrong_backend}", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "ours, backend wrong" in out
    assert "wrong: wrong result: gradient of gate_weight" in err
    written = json.loads((tmp_path / "results.json").read_text())["records"]
    assert {record["row"] for record in written if record["seconds"] is None} == {"wrong"}


def test_a_row_that_breaks_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(rows()["unsloth"], build=lambda inputs, scope: 1 / 0)
    group = Group(SMALL, "layer", ["forward"], [rows()["frozen"], broken], CPU, LIMITS, BRIEF)
    group.visit()
    found = {record.row: record.status for record in group.records()}
    assert found == {"frozen": "ok", "unsloth": "failed: ZeroDivisionError: division by zero"}


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dispatch.Backend("nowhere", lambda problem: f"it does not take T={problem.sizes.T}", lambda problem: None)
    monkeypatch.setitem(dispatch.BACKENDS, "picky", row)
    assert records(["picky"])["picky"].status == "not run: it does not take T=7"


def test_too_large_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measuring.group.available_bytes", lambda device: 3 * 2**30)
    huge = Shape(tokens=2**20, in_features=2**16, out_features=2**16)
    for record in records(["frozen", "torch"], huge).values():
        assert record.status.startswith("not run: needs about ")
        assert record.status.endswith("GiB, 3.0 GiB are free")


def test_factors_of_every_token_only_where_they_are_small() -> None:
    status = records(["literal"], Shape(tokens=4096))["literal"].status
    assert status == "not run: its factors A(t), B(t) take 1024 MiB, 64 at most are run"


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.rows.peers", raising=False)
    monkeypatch.setattr("benchmarks.rows.peers", None, raising=False)
    monkeypatch.delattr("benchmarks.rows.peers")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert records(["peft"])["peft"].status.startswith("not run: not installed: pip install peft")


def test_whole_models() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    plan = Plan(config, torch.float32, batch=2, sequence=16, prompt=4, new_tokens=3)
    models = Models(plan, CPU, BRIEF)
    models.visit()
    found = list(models.records())
    problem = Problem(Sizes(32, 32, 32, 8, 16, 8), torch.float32, CPU)
    ours = [name for name in timed_backends() if why_not_timed(name, problem) is None]
    assert "torch" in ours
    assert {record.status for record in found} == {"ok"}
    assert [record.row for record in found] == ["frozen", "peft", *ours] * 2
    layers = 2 * 16 * (4 * (32 + 32) + 3 * (32 + 48))  # rank 16, two layers of seven linears
    trained = [record.trained_parameters for record in found[: 2 + len(ours)]]
    assert trained == [0, layers, *[8 * layers + 2 * 8 * (6 * 32 + 48)] * len(ours)]


def test_whole_models_are_checked(wrong_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    right = dispatch.load("torch").forward

    def forward(*args, **kwargs):
        y, saved = right(*args, **kwargs)
        return 1.1 * y, saved

    monkeypatch.setattr(sys.modules["wrong_backend.forward"], "forward", forward)
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    plan = Plan(config, torch.float32, batch=1, sequence=8, prompt=4, new_tokens=2)
    models = Models(plan, CPU, BRIEF)
    models.visit()
    found = {record.row: record for record in models.records()}
    assert found["wrong"].status.startswith("wrong result: rms error ")
    assert found["wrong"].seconds is None
    assert found["torch"].status == "ok"
