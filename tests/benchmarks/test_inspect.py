"""What can be learned without a GPU: the host's cost of a call, and the traffic of the Triton kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rows.shapes import timed_backends
from tools.emulator import build

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
