"""The command: bad arguments, what it writes, what it keeps where it is stopped, and that a further backend has rows."""

import sys

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks.measuring import environment
from benchmarks.measuring.timing import interleave
from benchmarks.rows.shapes import grids
from benchmarks.rows.table import rows
from benchmarks.showing import compare, plots, report
from lmoe_kernels import dispatch
from tests.benchmarks.small import BRIEF, CPU, SMALL


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
def test_bad_input_is_refused_with_the_known_values(arguments: list[str], message: str, capsys) -> None:
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
    assert "visit 2 of 2, 24 -> 40, T=6, E=3, R=2, bfloat16: delta" in err
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


def test_a_visit_that_is_interrupted_keeps_its_earlier_phases(quickly, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    visits = []

    def interrupted(rows, *arguments, **options):
        visits.append(rows)
        if len(visits) == 2:
            raise KeyboardInterrupt
        return interleave(rows, *arguments, **options)

    monkeypatch.setattr("benchmarks.measuring.group.interleave", interrupted)
    sizes = ["--shapes", "8x8", "--tokens", "2", "--quick", "--rows", "frozen", "--out", str(tmp_path)]
    assert cli.main(sizes) == 0  # in the second of three phases
    assert [r["phase"] for r in report.load(tmp_path / "results.json")["records"]] == ["forward"]


def test_results_name_device_and_versions() -> None:
    found = environment.describe(CPU)
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "cores" in found["device"]


def test_a_further_backend_has_rows_tables_and_a_line_in_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.BACKENDS, "further", dispatch.BACKENDS["torch"])
    assert {"further", "further-fp32"} <= set(rows())
    assert all("further" in grid.rows for grid in grids(CPU, quick=True) if grid.rows is not None)
    assert plots.drawn_rows()["further"] == ("ours, further", plots.FURTHER_BACKEND)
