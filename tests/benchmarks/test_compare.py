"""The comparison of two runs."""

import json

import pytest

from benchmarks.measuring import environment
from benchmarks.showing import compare, report
from tests.benchmarks.small import CPU, LIMITS, records


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
