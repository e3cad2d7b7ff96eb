"""What every row should compute, in float64, and the refusal to time a row that computes something else."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import Row, Step, factored, per_token
from benchmarks.shapes import SCALING, Inputs

CHUNK = 64  # tokens: L-MoE's definition builds R (I + O) numbers for each

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
    return factored(i.x, i.weight, i.lora_a, i.lora_b, i.gate_weight)


def _factored_delta(i: Inputs) -> Tensor:
    return factored(i.x, None, i.lora_a, i.lora_b, i.gate_weight)


# the definition, evaluated in float64, and plain PyTorch's way to the same, evaluated in the inputs' dtype
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
    """Judges rows on one problem. Truths are kept, for rows that share a definition."""

    def __init__(self, inputs: Inputs, cpu_products: int) -> None:
        sizes = inputs.shape.in_features * inputs.shape.out_features
        fits = inputs.shape.tokens if inputs.device.type != "cpu" else max(1, cpu_products // sizes)
        self.inputs = inputs.tokens(0, min(inputs.shape.tokens, fits))
        self.kept: dict[tuple[str, str, bool], dict[str, Tensor]] = {}

    def complaint(self, row: Row, scope: str) -> str | None:
        """Why a row's results are wrong: the first output or gradient that is; None where all are right."""
        step = row.build(self.inputs, scope)
        y = step.forward()
        got = {"y": y.detach(), **gradients(step, y, self.inputs.dy)}
        true, plain = self._results(row.definition, scope, True), self._results(row.definition, scope, False)
        for name, tensor, pick in [("y", got["y"], lambda t: t), *_picks(step, got)]:
            complaint = compare(tensor, pick(plain[name]), pick(true[name]), self.inputs.x.dtype)
            if complaint is not None:
                return f"{'y' if name == 'y' else f'gradient of {name}'}: {complaint}"
        return None

    def _results(self, definition: str, scope: str, exact: bool) -> dict[str, Tensor]:
        key = definition, scope, exact
        if key not in self.kept:
            function = DEFINITIONS[definition, scope][0 if exact else 1]
            inputs = self.inputs.double() if exact else self.inputs
            self.kept[key] = _evaluate(function, inputs, CHUNK if exact else inputs.shape.tokens)
        return self.kept[key]


def gradients(step: Step, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The gradients of <y, dy> for every leaf, by the leaf's place: `name` or `name[expert]`."""
    grads = torch.autograd.grad(y, [tensor for tensor, *_ in step.leaves], dy)
    return {_place(name, expert): grad for (_, name, expert, _), grad in zip(step.leaves, grads, strict=True)}


def _place(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}[{expert}]"


def _picks(step: Step, got: dict[str, Tensor]) -> list[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """For every leaf: the input's name, the gradient in the input's layout, and how to cut it from the input's."""
    picks = []
    for _, name, expert, transposed in step.leaves:
        grad = got[_place(name, expert)]
        picks.append((name, grad.t() if transposed else grad, lambda t, e=expert: t if e is None else t[e]))
    return picks


def _evaluate(function: Definition, inputs: Inputs, chunk: int) -> dict[str, Tensor]:
    """y and the gradients of all inputs that take part, some tokens at a time."""
    per_token: dict[str, list[Tensor]] = {"y": [], "x": [], "gates": []}
    summed: dict[str, Tensor] = {}
    for start in range(0, max(1, inputs.shape.tokens), chunk):
        part = inputs.tokens(start, start + chunk)
        leaves = {name: getattr(part, name).detach().requires_grad_() for name in TRAINED}
        y = function(_with(part, leaves))
        grads = torch.autograd.grad(y, list(leaves.values()), part.dy, allow_unused=True)
        per_token["y"].append(y.detach())
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None and name in per_token:
                per_token[name].append(grad)
            elif grad is not None:
                summed[name] = grad if name not in summed else summed[name].add_(grad)
    return {name: torch.cat(parts) for name, parts in per_token.items() if parts} | summed


def _with(inputs: Inputs, tensors: dict[str, Tensor]) -> Inputs:
    return Inputs(**{**vars(inputs), **tensors})


def compare(ours: Tensor, plain: Tensor, true: Tensor, dtype: torch.dtype) -> str | None:
    """The error rule: at most four times plain PyTorch's error in the same dtype, and a few roundings.

    The room is for another order of sums and roundings: at T = 1 some GEMMs sum in blocks and others straight on, and that
    alone made a factor of three. A wrong result is beyond it by far.
    """
    if ours.shape != true.shape:
        return f"shape {tuple(ours.shape)}, not {tuple(true.shape)}"
    if true.numel() == 0:
        return None
    for whose, results in (("", ours), ("plain PyTorch is ", plain), ("the truth is ", true)):
        if not results.isfinite().all():  # no error is larger than NaN, and none than an infinite one that is allowed
            return f"{whose}not finite"
    for kind, size in (("rms", _rms), ("largest", _largest)):
        error, error_of_plain = size(ours.double() - true), size(plain.double() - true)
        allowed = 4 * error_of_plain + 8 * torch.finfo(dtype).eps * size(true)
        if error > allowed:
            return f"{kind} error {error:.2e}, allowed {allowed:.2e} (plain PyTorch: {error_of_plain:.2e})"
    return None


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _largest(t: Tensor) -> float:
    return t.abs().max().item()
