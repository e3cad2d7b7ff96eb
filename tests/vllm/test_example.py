"""examples/rl_vllm.py: the log-probabilities of vLLM and of training agree at every step, and the reward rises."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rl_vllm(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "rl_vllm.py"), "--steps", "12", "--out", str(tmp_path)]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = re.findall(r"^ +(\d+) +([\d.]+)  (\S+)$", run.stdout, re.MULTILINE)
    rewards, differences = ([float(row[column]) for row in rows] for column in (1, 2))
    assert len(rows) == 12
    assert max(differences) <= 1e-5
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])
    assert {"base", "adapter"} == {path.name for path in tmp_path.iterdir()}
