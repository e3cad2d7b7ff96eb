"""`python -m benchmarks.serving.op`: time the stacked op of serving for the layers of a Llama of 8 billion parameters.

On a GPU in CUDA graphs, as vLLM calls it, and on the host; on a CPU as it is called. Each row is compared with float64
before it is timed.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring.environment import describe
from benchmarks.measuring.timing import QUICK, Call, Effort, HostClock, Spread, capture, clock_for, interleave
from lmoe_kernels import Block, StackedExperts, lmoe
from lmoe_kernels.dispatch import BACKENDS
from lmoe_kernels.options import Problem, Sizes
from tools.error_rule import assert_no_worse

LAYERS = {  # features of x, and of each module
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
TOKENS = (1, 4, 16, 64, 256, 2048)
E, R, SCALING, COPIES = 8, 16, 2.0, 3
FROZEN, SEPARATE = "frozen", "separate calls"


class Inputs:
    """A call with inputs of its own, so that several take turns and caches stay cold."""

    def __init__(self, layer: str, tokens: int, device: torch.device) -> None:
        features, outs = LAYERS[layer]
        columns = [sum(outs[:i]) for i in range(len(outs))]
        self.blocks = [Block(E, R, out, column=c, scaling=SCALING) for out, c in zip(outs, columns, strict=True)]
        self.experts = StackedExperts(self.blocks, features, dtype=torch.bfloat16, device=device)
        names = "lora_a", "lora_b", "gate_weight"
        for i in range(len(outs)):
            for name in names:  # so large that the deltas are no smaller than y
                scale = (R if name == "lora_b" else features) ** -0.5
                self.experts.fill(i, name, scale * torch.randn(self.experts.part(i, name).shape, device=device))
        self.parts = [[self.experts.part(i, name).to(torch.bfloat16) for name in names] for i in range(len(outs))]
        self.x = torch.randn(tokens, features, dtype=torch.bfloat16, device=device)
        self.y = torch.randn(tokens, sum(outs), dtype=torch.bfloat16, device=device)
        self.weight = torch.randn(sum(outs), features, dtype=torch.bfloat16, device=device)

    def frozen(self) -> None:
        """The product of the frozen layer, which the experts come on top of."""
        torch.mm(self.x, self.weight.t(), out=self.y)

    def stacked(self, backend: str) -> None:
        """All modules by the stacked op."""
        self.experts.add_(self.y, self.x, backend=backend)

    def separate(self, dtype: torch.dtype = torch.bfloat16, y: Tensor | None = None) -> None:
        """Module by module with `lmoe`, whose result is copied to its columns of y."""
        y = self.y if y is None else y
        for block, part in zip(self.blocks, self.parts, strict=True):
            columns = y[:, block.column : block.column + block.out_features]
            a, b, gate = (t.to(dtype) for t in part)
            columns.copy_(lmoe(self.x.to(dtype), a, b, gate_weight=gate, scaling=SCALING, base=columns))


def _backends(device: torch.device) -> list[str]:
    """Those that can run here, but for the definition."""
    problem = Problem(Sizes(1, 64, 64, E, R, E), torch.bfloat16, device)
    return [name for name, row in BACKENDS.items() if name != "reference" and row.why_not(problem) is None]


def _check(inputs: Inputs, backend: str) -> None:
    """Raise if the result is worse than that of separate calls by more than the rule of errors allows."""
    start, true = inputs.y.clone(), inputs.y.double()
    inputs.separate(torch.float64, true)
    inputs.separate()
    plain = inputs.y.clone()
    inputs.y.copy_(start)
    inputs.stacked(backend)
    assert_no_worse(backend, inputs.y, [plain], true)
    inputs.y.copy_(start)


def measure(layer: str, tokens: int, device: torch.device, effort: Effort) -> dict[str, dict[str, float]]:
    """Microseconds of each row: of the device, and on a GPU also of the host in an eager call."""
    copies = [Inputs(layer, tokens, device) for _ in range(COPIES)]
    for backend in (names := _backends(device)):
        _check(copies[0], backend)
    calls: dict[str, list[Call]] = {FROZEN: [c.frozen for c in copies], SEPARATE: [c.separate for c in copies]}
    calls |= {name: [lambda c=c, name=name: c.stacked(name) for c in copies] for name in names}
    found: dict[str, dict[str, float]] = {name: {} for name in calls}
    if device.type == "cuda":
        on_host = interleave(calls, HostClock(), effort)
        torch.cuda.synchronize()
        for name, samples in on_host.items():
            found[name]["host"] = 1e6 * Spread.of([samples]).median
        calls = {name: [capture(lambda call=call: call) for call in of_row] for name, of_row in calls.items()}
    for name, samples in interleave(calls, clock_for(device), effort).items():
        spread = Spread.of([samples])
        found[name] |= {"median": 1e6 * spread.median, "low": 1e6 * spread.low, "high": 1e6 * spread.high}
    return found


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/here"), help="folder of serving-op.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = []
    with torch.no_grad():
        for layer in LAYERS:
            for tokens in options.tokens:
                rows = measure(layer, tokens, device, QUICK)
                records.append({"layer": layer, "tokens": tokens, "us": rows})
                of_rows = ", ".join(f"{name} {times['median']:.1f}" for name, times in rows.items())
                print(f"{layer}, T={tokens}, us: {of_rows}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": describe(device), "records": records}, indent=1)
    (options.out / "serving-op.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
