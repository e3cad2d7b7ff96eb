"""The benchmark suite: what it refuses, what it counts, what it writes. No test looks at a time."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import compare, environment, memory, report
from benchmarks.baselines import per_token, rows
from benchmarks.checks import Checker
from benchmarks.limits import Limits, floor_seconds
from benchmarks.measure import Group
from benchmarks.model import Models, Plan
from benchmarks.shapes import DTYPES, SCALING, Shape, make_inputs
from benchmarks.timing import Effort, interleave
from lmoe_kernels import dispatch, reference
from lmoe_kernels.backends import torch as torch_backend

CPU = torch.device("cpu")
SMALL = Shape(tokens=7, in_features=24, out_features=40, num_experts=3, rank=4)
BRIEF = Effort(visits=2, seconds=0.0, min_rounds=2, max_rounds=2, sample_seconds=0.0, cpu_products=2**33)
RATES, NARROW_RATES = dict.fromkeys(DTYPES, 1e12), dict.fromkeys(DTYPES, 1e11)
LIMITS = Limits(copy_bytes_per_s=1e9, gemm_flops_per_s=RATES, narrow_flops_per_s=NARROW_RATES, cache_bytes=1)
HALF = replace(SMALL, dtype="bfloat16")  # rows with fp32 adapters are rows of their own beside it
EAGER_ROWS = [name for name, row in rows().items() if not row.compiled and row.why_not(HALF, CPU) is None]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wrong_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend whose gates miss the half of their gradient that comes through A."""

    def backward(dy, dlogits_in, x, lora_a, lora_b, gate_weight, logits, u, scaling, *options):
        dx, da, db, dgate = torch_backend.backward(
            dy, dlogits_in, x, lora_a, lora_b, gate_weight, logits, u, scaling, *options
        )
        return dx, da, db, dgate / 2

    module = ModuleType("wrong_backend")
    module.forward, module.backward = torch_backend.forward, backward
    monkeypatch.setitem(sys.modules, "wrong_backend", module)
    monkeypatch.setitem(dispatch.BACKENDS, "wrong", dispatch.Backend("wrong", "wrong_backend", lambda problem: None))
    dispatch.load.cache_clear()
    yield "wrong"
    dispatch.load.cache_clear()


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the command without its measured limits, and with two rounds."""
    monkeypatch.setattr(cli, "measure_limits", lambda device, dtypes, quick: LIMITS)
    monkeypatch.setattr(cli, "QUICK", BRIEF)


def records(names: list[str], shape: Shape = SMALL, scope: str = "layer", phase: str = "forward+backward"):
    table = rows()
    group = Group(shape, scope, [phase], [table[name] for name in names], CPU, LIMITS, BRIEF)
    group.visit()
    group.visit()
    return {record.row: record for record in group.records()}


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
    arguments = i.lora_a, i.lora_b, i.gate_weight
    expected, _, _ = reference.forward(i.x, *arguments, None, None, SCALING, "factors", None, True, save=False)
    torch.testing.assert_close(per_token(i.x, *arguments), expected)


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


def test_a_backend_that_cannot_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dispatch.Backend("picky", "nowhere", lambda problem: f"it wants no T={problem.tokens}")
    monkeypatch.setitem(dispatch.BACKENDS, "picky", row)
    assert records(["picky"])["picky"].status == "not run: it wants no T=7"


def test_too_large_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.available_bytes", lambda device: 3 * 2**30)
    huge = Shape(tokens=2**20, in_features=2**16, out_features=2**16)
    for record in records(["frozen", "torch"], huge).values():
        assert record.status.startswith("not run: needs about ")
        assert record.status.endswith("GiB, 3.0 GiB are free")


def test_factors_of_every_token_only_where_they_are_small() -> None:
    status = records(["literal"], Shape(tokens=4096))["literal"].status
    assert status == "not run: its factors A(t), B(t) take 1024 MiB, 64 at most are run"


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.peers", raising=False)
    monkeypatch.setattr("benchmarks.peers", None, raising=False)
    monkeypatch.delattr("benchmarks.peers")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert records(["peft"])["peft"].status.startswith("not run: not installed: pip install peft")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "frozen,pefd"], "argument --rows: must be among 'frozen', 'peft', 'peft-fp32', "),
        (["--dtype", "int8"], "argument --dtype: must be among 'float32', 'bfloat16', 'float16', got 'int8'"),
        (
            ["--shapes", "2048"],
            "argument --shapes: must be in_features x out_features, like 2048x2048,4096x14336, got '2048'",
        ),
        (["--tokens", "1,0"], "argument --tokens: must be positive integers, like 1,1024, got '1,0'"),
        (["--threads", "0"], "argument --threads: must be a positive integer, got '0'"),
        (["--out", __file__], f"--out must be a folder that can be written, got {__file__!r}: File exists"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_told_with_what_is_known(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_writes_table_json_markdown_and_pictures(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli, "QUICK", BRIEF)
    sizes = ["--shapes", "24x40", "--tokens", "1,6", "--experts", "1,3", "--rank", "2", "--dtype", "float32,bfloat16"]
    assert cli.main([*sizes, "--quick", "--rows", "frozen,eager,loop,torch", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    results = report.load(tmp_path / "results.json")
    assert len(results["records"]) == 8 * 3 * (4 + 3)  # shapes, phases, rows of the layer and of the delta
    assert all(r["seconds"]["low"] <= r["seconds"]["median"] <= r["seconds"]["high"] for r in results["records"])
    assert all(r["over_frozen"]["median"] == 1 for r in results["records"] if r["row"] == "frozen")
    title = "24 -> 40, T=6, E=3, R=2, bfloat16: layer, forward+backward"
    assert title in out
    assert title in (tmp_path / "results.md").read_text()
    assert "done" in err
    for name in ("tokens", "peers", "experts", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert compare.main([str(tmp_path / "results.json")] * 2) == 0


def test_without_matplotlib_all_but_the_pictures_is_written(
    quickly, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sizes = ["--shapes", "8x8", "--tokens", "2"]
    assert cli.main([*sizes, "--quick", "--rows", "frozen", "--out", str(tmp_path)]) == 0
    assert "no pictures: matplotlib is not installed (pip install matplotlib)" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]


def test_rows_without_the_frozen_linear_have_no_ratio(quickly, tmp_path) -> None:
    sizes = ["--shapes", "8x8", "--tokens", "2,3", "--quick", "--rows", "torch,eager", "--out", str(tmp_path)]
    assert cli.main(sizes) == 0
    assert {r["over_frozen"] is None for r in report.load(tmp_path / "results.json")["records"]} == {True}


def test_an_interrupted_run_keeps_what_it_has(quickly, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.model.Models, "visit", interrupted)
    monkeypatch.setattr(cli, "grids", lambda device, quick: [cli.Grid((SMALL,))])
    assert cli.main(["--quick", "--rows", "frozen", "--out", str(tmp_path)]) == 0
    assert "stopped at step 2 of 5, by the user" in capsys.readouterr().out
    assert report.load(tmp_path / "results.json")["records"] == []


def test_a_visit_interrupted_amid_its_rows_leaves_the_earlier_ones(
    quickly, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = []

    def interrupted(rows, *arguments, **options):
        visits.append(rows)
        if len(visits) == 2:
            raise KeyboardInterrupt
        return interleave(rows, *arguments, **options)

    monkeypatch.setattr("benchmarks.measure.interleave", interrupted)
    sizes = ["--shapes", "8x8", "--tokens", "2", "--quick", "--rows", "frozen", "--out", str(tmp_path)]
    assert cli.main(sizes) == 0  # in the second of three phases
    assert [r["phase"] for r in report.load(tmp_path / "results.json")["records"]] == ["forward"]


def test_whole_models() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    plan = Plan(config, torch.float32, batch=2, sequence=16, prompt=4, new_tokens=3)
    models = Models(plan, CPU, BRIEF)
    models.visit()
    found = list(models.records())
    assert [record.status for record in found] == ["ok"] * 6
    assert [record.row for record in found] == ["frozen", "peft", "torch"] * 2
    layers = 2 * 16 * (4 * (32 + 32) + 3 * (32 + 48))  # rank 16, two layers of seven linears
    assert [record.trained_parameters for record in found[:3]] == [0, layers, 8 * layers + 2 * 8 * (6 * 32 + 48)]


def test_whole_models_are_checked(wrong_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        sys.modules["wrong_backend"],
        "forward",
        lambda *a: (torch_backend.forward(*a)[0] * 1.1, *torch_backend.forward(*a)[1:]),
    )
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    plan = Plan(config, torch.float32, batch=1, sequence=8, prompt=4, new_tokens=2)
    models = Models(plan, CPU, BRIEF)
    models.visit()
    found = {record.row: record for record in models.records()}
    assert found["wrong"].status.startswith("wrong result: rms error ")
    assert found["wrong"].seconds is None
    assert found["torch"].status == "ok"


def test_compare_names_what_became_slower_and_nothing_else(tmp_path, capsys) -> None:
    found = records(["frozen", "torch", "eager"])
    before = report.make_results(environment.describe(CPU), LIMITS, "", list(found.values()), [], "")
    for record in before["records"]:
        record["seconds"] = {"median": 1.0, "low": 0.95, "high": 1.05, "visits": [0.99, 1.12, 1.0]}
        record["over_frozen"] = {"median": 1.0, "low": 0.95, "high": 1.05, "visits": [1.0, 1.01, 0.99]}

    def after(times: dict[str, float], ratios: dict[str, float]) -> tuple[int, str]:
        changed = json.loads(json.dumps(before))
        for record in changed["records"]:
            for key, factors in (("seconds", times), ("over_frozen", ratios)):
                factor, spread = factors.get(record["row"], 1), record[key]
                record[key] = {name: spread[name] * factor for name in ("median", "low", "high")}
                record[key]["visits"] = [median * factor for median in spread["visits"]]
        for name, results in (("before", before), ("after", changed)):
            (tmp_path / f"{name}.json").write_text(json.dumps(results))
        code = compare.main([str(tmp_path / "before.json"), str(tmp_path / "after.json")])
        return code, capsys.readouterr().out

    code, out = after({"torch": 1.5}, {"torch": 1.5})
    assert code == 1
    assert "T=7, E=3, R=4, float32, layer, forward+backward: torch: time +50.0%, over the frozen linear +50.0%" in out
    assert "3 rows compared, 1 beyond their spread" in out
    assert after({}, {})[0] == 0
    assert after({"torch": 1.08}, {"torch": 1.08})[0] == 0  # below the threshold
    assert after({"torch": 1.15}, {"torch": 1.15})[0] == 0  # one of the visits took as long
    assert after(dict.fromkeys(("torch", "eager", "frozen"), 2.0), {"torch": 1.04})[0] == 0  # the machine was busy
    assert after({"frozen": 2.0}, {"torch": 0.5, "eager": 0.5})[0] == 0  # the frozen linear was disturbed
    code, out = after({"torch": 0.5}, {"torch": 0.5})
    assert code == 0
    assert "torch: time -50.0%" in out


def test_compare_refuses_other_files(tmp_path, capsys) -> None:
    (tmp_path / "other.json").write_text('{"schema": 0}')
    for name in ("missing.json", "other.json"):
        with pytest.raises(SystemExit):
            compare.main([str(tmp_path / name)] * 2)
        assert f"{name}: " in capsys.readouterr().err


def test_bytes_and_flops_that_operations_move() -> None:
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    with memory.OpCounter(LIMITS, "float32") as counter:
        a @ b.t().contiguous().t()
    assert counter.flops == 2 * 3 * 5 * 7
    assert counter.bytes == 4 * (2 * 35 + 15 + 35 + 21)  # the copy of b, then the product
    assert counter.seconds == pytest.approx(counter.bytes / 1e9)
    with memory.OpCounter(LIMITS, "float32") as counter:
        c.view(21).unsqueeze(0)
    assert counter.bytes == 0
    with memory.OpCounter(LIMITS, "float32") as counter:
        c.addmm_(a, b)
    assert counter.bytes == 4 * (21 + 15 + 35 + 21)
    with memory.OpCounter(LIMITS, "float32") as counter:
        c.addmm_(a, b, beta=0)
    assert counter.bytes == 4 * (15 + 35 + 21)


def test_narrow_products_are_counted_at_their_own_rate() -> None:
    a, b = torch.randn(300, 200), torch.randn(200, 16)
    endless = replace(LIMITS, copy_bytes_per_s=float("inf"))
    with memory.OpCounter(endless, "float32") as counter:
        a @ b
    assert counter.seconds == pytest.approx(2 * 300 * 200 * 16 / 1e11)
    with memory.OpCounter(endless, "float32") as counter:
        a @ a.t()
    assert counter.seconds == pytest.approx(2 * 300 * 200 * 300 / 1e12)


def test_the_operations_of_our_backend_are_counted() -> None:
    tokens, ins, outs, experts, ranks = 7, 24, 40, 3, 3 * 4  # of SMALL
    flops = records(["torch"], phase="forward")["torch"].counted_flops
    products = 2 * tokens * (ins * outs + ranks * (ins + outs) + experts * ins)
    assert flops is not None
    assert products <= flops <= 1.1 * products  # and the mix


def test_what_is_kept_for_the_backward() -> None:
    found = records(["torch", "unsloth", "loop"], replace(SMALL, dtype="bfloat16"))
    tokens, experts, rank = SMALL.tokens, SMALL.num_experts, SMALL.rank
    assert found["torch"].saved_bytes == tokens * (4 * experts + 2 * experts * rank)
    assert found["unsloth"].saved_bytes == 0
    assert found["loop"].saved_bytes > tokens * experts * SMALL.out_features * 2


def test_peak_is_what_is_held_at_one_time() -> None:
    def call() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        second + 1

    assert memory.peak_bytes(call, CPU) == pytest.approx(8000, abs=500)


def test_the_floors_are_those_of_the_design() -> None:
    """T=1000, 100 -> 200, E R = 32, fp32, on a machine that copies one byte a second and multiplies at no cost."""
    limits = Limits(1.0, {"float32": float("inf")}, {}, 1)
    shape = Shape(1000, 100, 200, 4, 8)
    x, y, weight = 100 * 4000, 200 * 4000, 100 * 200 * 4
    parameters = 4 * (32 * 300 + 4 * 100)
    saved = 1000 * (32 * 4 + 4 * 4)

    def floor(definition: str, scope: str, phase: str) -> float:
        return floor_seconds(definition, shape, scope, phase, limits)

    assert floor("frozen", "layer", "forward") == x + y + weight
    assert floor("factors", "delta", "forward") == x + y + parameters
    assert floor("factors", "layer", "forward") == 2 * x + 3 * y + weight + parameters
    assert floor("factors", "delta", "backward") == 2 * x + y + 2 * parameters + saved
    both = floor("factors", "layer", "forward+backward")
    assert both == floor("factors", "layer", "forward") + saved + floor("factors", "layer", "backward")


def test_device_and_versions_go_with_the_data() -> None:
    found = environment.describe(CPU)
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "cores" in found["device"]
