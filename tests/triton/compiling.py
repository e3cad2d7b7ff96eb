"""Programs in which Triton compiles: in processes of their own, since it interprets in that of the tests."""

import os
import subprocess
import sys

import pytest

from tools import stubbed_gpu


def run_compiled(program: str, *arguments: str, **environment: str) -> list[str]:
    """The lines that a program prints; without a C compiler, which the stubbed GPU needs, the test is skipped."""
    if stubbed_gpu.COMPILER is None:
        pytest.skip("no C compiler")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
