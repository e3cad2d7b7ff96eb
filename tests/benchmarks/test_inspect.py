"""What can be learned without a GPU: the host's cost of a call, and the traffic of the Triton kernels."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.rows.shapes import timed_backends
from tests import plans
from tests.problems import Case, make_problem
from tools import calls
from tools.emulator import build
from tools.interpreter.bytes import counted

ROOT = Path(__file__).parents[2]


def test_the_hosts_cost_of_every_backend(request: pytest.FixtureRequest) -> None:
    """In a process of its own: its drivers are stubs from then on."""
    if build.COMPILER is None:
        pytest.skip("no g++ to compile the bindings")
    cache = str(request.config.cache.mkdir("cuda_emu"))
    program = "from benchmarks.inspect import host; host.TOKENS = (1, 16); host.SECONDS = 0; host.main()"
    command = [sys.executable, "-c", program, "--rounds", "2", "--cache", cache]
    compiles = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=compiles, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    title, *lines = done.stdout.splitlines()
    assert "E=8 R=16" in title
    expected = [(t, name) for t in ("1", "16") for name in [*timed_backends(), "eager"]]
    for table, temperature in ((lines[: len(lines) // 2], "hot"), (lines[len(lines) // 2 :], "cold")):
        heading, header, *cells = table
        assert heading.startswith(temperature)
        assert "least (median) of 2" in heading
        assert "no gradients" in header
        assert [tuple(line.split()[:2]) for line in cells] == expected
        assert all(line.count("(") == 5 for line in cells)


def test_traffic_names_tensors_and_the_least_possible() -> None:
    pytest.importorskip("triton")
    from benchmarks.inspect import traffic

    found = traffic.measure(traffic.PLANS["tokens fill the chip"])
    loaded = {(one.direction, one.tensor): one.loaded for one in found if one.tensor in ("x", "dy")}
    assert loaded["forward", "x"] == 2 * traffic.I
    assert "forward x 1.00, y 1.00; backward dy 2.00, x 1.00, dx 1.00" in traffic.over_the_floor(found)


@pytest.mark.parametrize("tokens, processors", [(70, 1), (70, 16)], ids=["one pass", "splits"])
def test_a_models_bytes_are_those_that_the_kernels_move(
    tokens: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from benchmarks.inspect import kernels, static
    from lmoe_kernels.backends.triton import host
    from lmoe_kernels.backends.triton.plans import Chip

    plans.set_chip(Chip("interpreter", processors, 1 << 16), monkeypatch)
    launch, modelled = host.launch, Counter()

    def record(kernel, grid: tuple[int, ...], *args, tile, **constants) -> None:
        one = static.Launch("", kernel.fn.__name__, (), tuple(constants.items()), tile)
        traffic = kernels.traffic_of(static.Recorded(one, grid, static.arguments_of(kernel, args)))
        modelled.update({(one.kernel, "loaded"): traffic.loaded, (one.kernel, "stored"): traffic.stored})
        launch(kernel, grid, *args, tile=tile, **constants)

    monkeypatch.setattr(host, "launch", record)
    case = Case(T=tokens, I=300, O=330, E=5, R=8)
    problem = make_problem(case, torch.bfloat16)
    x, factors = problem.tensors["x"], calls.factors_of(problem.tensors)
    with counted() as counts:
        _, saved = calls.forward_saved("triton", x, factors, case.options)
        calls.backward("triton", problem.dy, x, factors, saved, case.options, dlogits=problem.dlogits)
    moved = Counter()
    for access, count in counts.items():
        moved.update({(access.kernel, "loaded"): count.loaded, (access.kernel, "stored"): count.stored})
    assert modelled == moved
    assert ("_shrink_fwd_kernel", "loaded") in moved or processors == 1


def test_a_model_of_one_call_in_lines_and_in_a_table(tmp_path: Path) -> None:
    """In a process of its own, since here Triton interprets. Nothing is compiled: all kernels have the same figures."""
    pytest.importorskip("triton")
    figures = {"regs": 100, "loop": 90, "loop_mma": 8, "serialised": True, "programs": 2}
    program = f"from benchmarks.inspect import kernels; kernels.figures_of = lambda *_: {figures}; kernels.main()"
    command = [sys.executable, "-c", program, "--chip", "H200", "--tokens", "8192", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    text = (tmp_path / "kernels-model.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "kernels-model.jsonl").read_text().splitlines()]
    assert text.startswith("A MODEL, nothing was timed")
    assert "H200: assumed 4.3 TB/s from memory, 6.0 TB/s from the L2" in text
    forward = [line for line in lines if line["direction"] == "forward"]
    assert [line["kernel"] for line in forward] == ["_shrink_mix_fwd_kernel", "_expand_fwd_kernel"]
    assert lines[-1]["kernel"] == "_expand_fwd_kernel"
    least, total = 2 * 8192 * 4096 * 2 / 4.3e6, sum(line["model_us"] for line in forward)  # x and y are 64 MB each
    assert f"forward: modelled {total:.0f} us, floor {least:.0f} us, {100 * least / total:.0f} %" in text
