"""A type checker accepts the right calls of a user's file and reports every wrong one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USERS_FILE = """
import torch
from lmoe_kernels import LMoELinear, apply_lmoe, explain, lmoe, lmoe_linear, load_lmoe, use_backend

layer = LMoELinear(8, 8, num_experts=4, mixing="outputs", top_k=2, gate_bias=True, backend="torch")
LMoELinear(8, 8, num_expert=3)  # wrong
LMoELinear(8, 8, mixing="mean")  # wrong
LMoELinear.from_linear(torch.nn.Linear(8, 8), num_experts=4, dtype=torch.float32)
LMoELinear.from_linear(torch.nn.Linear(8, 8), r=4)  # wrong
apply_lmoe(layer, ["q_proj"], num_experts=4, alpha=16)
apply_lmoe(layer, ["q_proj"], ranks=3)  # wrong
apply_lmoe(layer, ["q_proj"], backend="cublas")  # wrong
load_lmoe(layer, "adapter", backend="torch")
load_lmoe(layer, "adapter", backend="cublas")  # wrong

x, a, b, g = torch.zeros(2, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), torch.zeros(4, 8)
lmoe(x, a, b, gate_weight=g).sum()
lmoe(x, a, b, gate_weight=g, base=x, return_router_logits=True)[1].sum()
lmoe(x, a, b, gate_weight=g, return_router_logits=True).sum()  # wrong
lmoe(x, a, b, gate_weights=g)  # wrong
lmoe(x, a, b, gate_weight=g, mixing="mean")  # wrong
lmoe_linear(x, g, None, a, b, gate_weight=g, gate_bias=torch.zeros(4)).sum()
y, router_logits = lmoe_linear(x, g, None, a, b, gate_weight=g, return_router_logits=True)
lmoe_linear(x, g, None, a, b, gate_weight=g, top_k=2.0)  # wrong
with_logits: bool = y.sum().item() > 0
lmoe(x, a, b, gate_weight=g, return_router_logits=with_logits).sum()  # wrong
explain(x, a, b, gate_weight=g, backend="cublas")  # wrong
with use_backend("reference"):
    layer(x)
with use_backend("cublas"):  # wrong
    layer(x)
"""


def test_a_users_file(tmp_path: Path) -> None:
    checker = Path(sys.executable).with_name("basedpyright")
    if not checker.exists():
        pytest.skip("basedpyright is not installed")
    file = tmp_path / "users.py"
    file.write_text(USERS_FILE, encoding="utf-8")
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [str(checker), "--outputjson", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path).stdout
    found = {d["range"]["start"]["line"]: d["message"] for d in json.loads(output)["generalDiagnostics"]}
    lines = USERS_FILE.splitlines()
    wrong = {number for number, line in enumerate(lines) if line.endswith("# wrong")}
    assert {lines[n]: text for n, text in found.items() if n not in wrong} == {}
    assert [lines[n] for n in sorted(wrong - found.keys())] == []
