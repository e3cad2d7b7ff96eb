"""What every row must compute, in float64, and the refusal to time a row that computes something else."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows.baselines import per_token
from benchmarks.rows.shapes import SCALING, Inputs
from benchmarks.rows.steps import Row
from lmoe_kernels.options import Options
from tools.error_rule import ORDERS, Errors, complaint, errors, reordered, worst
from tools.factored import factored

CHUNK = 64  # tokens evaluated at once: L-MoE's definition builds R (I + O) numbers for each
LETTERS = {
    "x": "TI", "weight": "OI", "lora_a": "ERI", "lora_b": "ERO", "gate_weight": "EI", "gates": "TE", "dy": "TO", "y": "TO",
}  # fmt: skip

Definition = Callable[[Inputs], Tensor]


def _frozen(i: Inputs) -> Tensor:
    return F.linear(i.x, i.weight)


def _one(i: Inputs) -> Tensor:
    return _frozen(i) + F.linear(i.x, i.lora_a[0]) @ i.lora_b[0] * SCALING


def _sum(i: Inputs) -> Tensor:
    deltas = [F.linear(i.x, a) @ b * SCALING for a, b in zip(i.lora_a, i.lora_b, strict=True)]
    return sum(deltas, _frozen(i))


def _scaled(i: Inputs) -> Tensor:
    deltas = [F.linear(i.x * g[:, None], a) @ b * SCALING for a, b, g in zip(i.lora_a, i.lora_b, i.gates.t(), strict=True)]
    return sum(deltas, _frozen(i))


def _outputs(i: Inputs) -> Tensor:
    gates = F.linear(i.x, i.gate_weight).softmax(dim=1)
    deltas = [F.linear(i.x, a) @ b * SCALING * g[:, None] for a, b, g in zip(i.lora_a, i.lora_b, gates.t(), strict=True)]
    return sum(deltas, _frozen(i))


def _factors(i: Inputs) -> Tensor:
    return _frozen(i) + _factors_delta(i)


def _factors_delta(i: Inputs) -> Tensor:
    return per_token(i.x, i.lora_a, i.lora_b, i.gate_weight)


def _factored(i: Inputs) -> Tensor:
    return _frozen(i) + _factored_delta(i)


def _factored_delta(i: Inputs) -> Tensor:
    return factored(i.x, i.factors, Options(SCALING))[0]


# the definition, evaluated in float64, and the same in plain PyTorch, evaluated in the inputs' dtype
DEFINITIONS: dict[tuple[str, str], tuple[Definition, Definition]] = {
    ("frozen", "layer"): (_frozen, _frozen),
    ("frozen", "delta"): (_frozen, _frozen),
    ("one", "layer"): (_one, _one),
    ("sum", "layer"): (_sum, _sum),
    ("scaled", "layer"): (_scaled, _scaled),
    ("outputs", "layer"): (_outputs, _outputs),
    ("factors", "layer"): (_factors, _factored),
    ("factors", "delta"): (_factors_delta, _factored_delta),
}
TRAINED = ("x", "lora_a", "lora_b", "gate_weight", "gates")


class Checker:
    """Judges rows on one problem. Truths and errors of plain PyTorch are kept for rows that share a definition."""

    def __init__(self, inputs: Inputs, cpu_products: int) -> None:
        sizes = inputs.shape.in_features * inputs.shape.out_features
        fits = inputs.shape.tokens if inputs.device.type != "cpu" else max(1, cpu_products // sizes)
        self.inputs = inputs.tokens(0, min(inputs.shape.tokens, fits))
        self.truths: dict[tuple[str, str], dict[str, Tensor]] = {}
        self.of_plain: dict[tuple[str, str], dict[tuple[str, int | None], Errors]] = {}

    def complaint(self, row: Row, scope: str) -> str | None:
        """Why a row's results are wrong: the first output or gradient that is; None where all are right."""
        step = row.build(self.inputs, scope)
        true, of_plain = self._known(row.definition, scope)
        y = step.forward()
        grads = torch.autograd.grad(y, [tensor for tensor, *_ in step.grad_inputs], self.inputs.dy)
        results: list[tuple[str, int | None, Tensor]] = [("y", None, y.detach())]
        for (_, name, expert, transposed), grad in zip(step.grad_inputs, grads, strict=True):
            results.append((name, expert, grad.t() if transposed else grad))
        for name, expert, result in results:
            truth = true[name] if expert is None else true[name][expert]
            found = complaint(result, of_plain[name, expert], truth, self.inputs.x.dtype)
            if found is not None:
                return f"{'y' if name == 'y' else f'gradient of {name}'}: {found}"
        return None

    def _known(self, definition: str, scope: str) -> tuple[dict[str, Tensor], dict[tuple[str, int | None], Errors]]:
        """The truth of a definition, and plain PyTorch's errors, of each tensor and of each expert's part of it."""
        key = definition, scope
        if key not in self.truths:
            exact, in_plain = DEFINITIONS[key]
            true = self.truths[key] = evaluate(exact, self.inputs.double(), CHUNK)
            found = [
                {place: errors(result, part) for place, result, part in _parts(results, true)}
                for results in in_orders(in_plain, self.inputs)
            ]
            self.of_plain[key] = {place: worst(of_one[place] for of_one in found) for place in found[0]}
        return self.truths[key], self.of_plain[key]


def in_orders(function: Definition, inputs: Inputs) -> Iterator[dict[str, Tensor]]:
    """The results of a function in the inputs' dtype, its features, experts and ranks in one order after another.

    The first two are the inputs' own order. In every second one, matrices are stored transposed: at T = 1 that decides if a
    product sums in blocks or straight on, which changes its error by a factor of three (fp32, CPU, torch 2.13, 2026-11).
    """
    _, *sizes, _ = inputs.shape.sizes
    generator = torch.Generator().manual_seed(0)
    for number in range(ORDERS):
        draw = torch.arange if number < 2 else partial(torch.randperm, generator=generator)
        order = {letter: draw(size) for letter, size in zip("IOER", sizes, strict=True)}
        order["E"] = torch.cat([order["E"].new_zeros(1), order["E"][order["E"] > 0]])  # expert 0 may be the only one used
        order = {letter: permutation.to(inputs.device) for letter, permutation in order.items()}
        back = {letter: permutation.argsort() for letter, permutation in order.items()}
        tensors = {name: reordered(t, LETTERS[name], order) for name, t in tensors_of(inputs).items()}
        if number % 2 == 1:
            tensors = {name: t.mT.contiguous().mT for name, t in tensors.items()}
        results = evaluate(function, with_tensors(inputs, tensors), max(1, inputs.shape.tokens))
        yield {name: reordered(t, LETTERS[name], back) for name, t in results.items()}


def evaluate(function: Definition, inputs: Inputs, chunk: int) -> dict[str, Tensor]:
    """y and the gradients of all inputs that take part, computed for `chunk` tokens at a time."""
    per_token: dict[str, list[Tensor]] = {"y": [], "x": [], "gates": []}
    summed: dict[str, Tensor] = {}
    for start in range(0, max(1, inputs.shape.tokens), chunk):
        part = inputs.tokens(start, start + chunk)
        leaves = {name: getattr(part, name).detach().requires_grad_() for name in TRAINED}
        y = function(with_tensors(part, leaves))
        grads = torch.autograd.grad(y, list(leaves.values()), part.dy, allow_unused=True)
        per_token["y"].append(y.detach())
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None and name in per_token:
                per_token[name].append(grad)
            elif grad is not None:
                summed[name] = grad if name not in summed else summed[name].add_(grad)
    return {name: torch.cat(parts) for name, parts in per_token.items() if parts} | summed


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a problem by name."""
    return {name: t for name, t in vars(inputs).items() if isinstance(t, Tensor)}


def with_tensors(inputs: Inputs, tensors: dict[str, Tensor]) -> Inputs:
    """The same problem with other tensors."""
    return Inputs(**{**vars(inputs), **tensors})


def _parts(results: dict[str, Tensor], true: dict[str, Tensor]) -> Iterator[tuple[tuple[str, int | None], Tensor, Tensor]]:
    """Every result with its truth, and each expert's part of those that have one: a row may have a tensor for each."""
    for name, result in results.items():
        yield (name, None), result, true[name]
        if LETTERS[name].startswith("E"):
            yield from (((name, e), result[e], true[name][e]) for e in range(len(result)))
