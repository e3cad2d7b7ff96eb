# SPDX-License-Identifier: Apache-2.0
"""Fits gates and routers by ridge regression, in closed form: each token shall get the expert of its domain.

The matrices of a gate, H x H in float64, are summed up while the model reads the domains. With more gates than fit
into the memory that is allowed for them, the domains are read once for each group of gates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_kernels.checks import check_bool, check_finite, check_positive_int, fail
from lmoe_kernels.distributed import how_distributed
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.routers import Router
from lmoe_kernels.targets import layers_with_experts, nearest

_OP = "fit_router"
_SHARPNESS = tuple(2.0 ** (i / 2) for i in range(17))  # 1 to 256, the values that are tried

_Batch = Tensor | Mapping[str, Any]


class RouterFit(NamedTuple):
    """How well a fitted gate finds the domain of a token, on the tokens that it was fitted to."""

    accuracy: float  # the share of the tokens whose largest router logit is that of their domain's expert
    loss: float  # the cross-entropy of the gates and the domains, in nats
    sharpness: float  # the factor of the regression's solution


class _Gate(NamedTuple):
    """A gate to fit, and where it reads."""

    name: str  # of the layer that has it
    weight: Tensor  # (E, H)
    bias: Tensor | None  # (E)
    experts: tuple[str, ...]
    module: nn.Module  # whose first argument is what `read` is called with
    read: Callable[[Tensor], Tensor]  # gives what the logits are a linear function of


def fit_router(
    model: nn.Module,
    domains: Mapping[str, Iterable[_Batch]],
    *,
    ridge: float = 0.01,
    sharpness: float | None = None,
    with_experts: bool = True,
    memory: int = 2**32,
) -> dict[str, RouterFit]:
    """Fit all gates and routers of a model by ridge regression, in closed form and without a gradient step.

    Each token of a domain shall get the expert of that name, and all domains count the same, however many tokens they have.
    The model runs in evaluation mode and without gradients; its modes are restored. An error leaves the model unchanged.

    Semantics:
        W, b = the minimum of mean((W x + b - onehot(expert of x's domain))^2) + ridge * mean(x^2) * sum(W^2)
        gate_weight = sharpness * W;  gate_bias = sharpness * b

    A gate without a bias is fitted without b. In PEFT, the gates of the active adapter are fitted.

    Args:
        model: a model with L-MoE layers, plain or wrapped.
        domains: batches of text by the names of the experts, see `expert_names`. A batch is a tensor of token ids, or the
            keywords of the model as a dict. Where its attention_mask (B, S) is 0, tokens do not count.
        ridge: the strength of the penalty, relative to the mean square of what a gate reads.
        sharpness: the factor of the solution, whose logits are within about 0 and 1. None for the one out of 1, sqrt(2), 2,
            ..., 256 that gives the smallest cross-entropy of the gates and the domains, for each gate.
        with_experts: whether the gates read what the model computes with its experts and its gates before the fit, or what
            the frozen model computes. Experts with equal gates, as of `from_lora_adapters`, gave better fits than none: of
            the way from the uniform average to the oracle, routers of blocks on the prefix came 69 % instead of 64 %, those
            of layers 57 % instead of 40 %, and gates of layers on the token 28 % instead of 17 %. (The demo's model, four
            LoRAs of rank 16, 16 windows of 128 bytes a domain, one seed; Xeon, 2 cores, 2026-11-26.)
        memory: bytes for the matrices of the gates, 16 H^2 each. If they need more, the domains are read several times.

    Returns:
        how well each gate finds the domains, by the name of the layer that has it.

    Raises:
        ValueError: the model has no gates or several active adapters, is distributed (DDP, FSDP) or on the meta device; a
            domain is no expert, an expert has no domain, or a gate reads no tokens of a domain; a number does not fit.
        TypeError: an argument has the wrong type.

    Example:
        from_lora_adapters(model, {"english": "loras/english", "python": "loras/python"})
        fit_router(model, {"english": english_batches, "python": python_batches})
    """
    check_finite(_OP, "ridge", ridge, "be a number above 0", at_least=0)
    if ridge == 0:
        fail(_OP, "ridge", "be a number above 0", ridge)
    if sharpness is not None:
        check_finite(_OP, "sharpness", sharpness, "be None or a finite number")
    check_bool(_OP, "with_experts", with_experts)
    check_positive_int(_OP, "memory", memory)
    gates = _gates(model)
    batches = _batches(domains, gates)
    with _evaluated(model, with_experts):
        solved = [one for group in _groups(gates, memory) for one in _solved(model, group, batches, ridge)]
        tried = _SHARPNESS if sharpness is None else (sharpness,)
        fits = _measured(model, gates, solved, batches, tried)
    with torch.no_grad():
        for gate, (weight, bias), fit in zip(gates, solved, fits, strict=True):
            gate.weight.copy_(weight * fit.sharpness)
            if gate.bias is not None:
                gate.bias.copy_(bias * fit.sharpness)
    return {gate.name: fit for gate, fit in zip(gates, fits, strict=True)}


def _gates(model: nn.Module) -> list[_Gate]:
    """The gates of the active mixtures of a model: those of layers, and those of routers."""
    if not isinstance(model, nn.Module):
        fail(_OP, "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    if (how := how_distributed(model)) is not None:
        fail(_OP, "model", "not be distributed", f"one {how}")
    gates: list[_Gate] = []
    module: Any  # a layer of one of the two kinds
    for name, module in layers_with_experts(model).items():
        mixtures = module.mixtures()
        if len(module.active()) > 1:
            fail(_OP, "model", "have one active adapter", f"{', '.join(map(repr, module.active()))} in {name!r}")
        for adapter in module.active():
            config, tensors = mixtures[adapter]
            if (weight := tensors.get("gate_weight")) is not None:
                gates.append(_Gate(name, weight, tensors.get("gate_bias"), config.names(), module, _wide))
        router: Router | None = getattr(module, "router", None)
        if router is not None:
            reader = router if router.reads_blocks else module
            names = module.options().names()
            gates.append(_Gate(name, router.gate_weight, router.gate_bias, names, reader, _reading(router)))
    if not gates:
        fail(_OP, "model", "have L-MoE layers with gates (see apply_lmoe)", "none")
    for gate in gates:
        if gate.weight.is_meta:
            fail(_OP, "model", "have data", f"layer {gate.name!r} on the meta device")
    return gates


def _batches(domains: Mapping[str, Iterable[_Batch]], gates: list[_Gate]) -> dict[str, list[_Batch]]:
    """The batches by domain. There must be one domain for each expert of each gate."""
    if not isinstance(domains, Mapping):
        fail(_OP, "domains", "be a dict of batches by the names of experts", type(domains).__name__, TypeError)
    for gate in gates:
        for name in domains:
            if name not in gate.experts:
                got = f"{name!r}, which {gate.name!r} does not have; {nearest(str(name), gate.experts)}"
                fail(_OP, "domains", "have the names of experts", got)
        if lacking := [name for name in gate.experts if name not in domains]:
            fail(_OP, "domains", "have one for each expert", f"none for {lacking[0]!r} of {gate.name!r}")
    batches: dict[str, list[_Batch]] = {}
    for name, given in domains.items():
        if isinstance(given, Tensor | Mapping | str) or not isinstance(given, Iterable):
            fail(_OP, f"domains[{name!r}]", "be several batches", type(given).__name__, TypeError)
        batches[name] = list(given)
        for batch in batches[name]:
            if not isinstance(batch, Tensor | Mapping):
                must = "hold tensors of token ids, or dicts of the model's keywords"
                fail(_OP, f"domains[{name!r}]", must, type(batch).__name__, TypeError)
    return batches


def _groups(gates: list[_Gate], memory: int) -> Iterator[list[_Gate]]:
    """Groups of gates whose matrices together need at most so many bytes, or of one gate."""
    group: list[_Gate] = []
    left = memory
    for gate in gates:
        needed = 16 * gate.weight.shape[1] ** 2
        if group and needed > left:
            yield group
            group, left = [], memory
        group.append(gate)
        left -= needed
    yield group


@contextmanager
def _evaluated(model: nn.Module, with_experts: bool) -> Iterator[None]:
    """Evaluation mode without gradients, compiled code and, if wanted, experts; afterwards the model is as before."""
    modes = {module: module.training for module in model.modules()}
    layers = list(layers_with_experts(model).values())
    switches = [(layer, "disabled" if isinstance(layer, LMoELinear) else "_disable_adapters") for layer in layers]
    before = [getattr(layer, switch) for layer, switch in switches]
    try:
        model.eval()
        for layer, switch in switches:
            setattr(layer, switch, getattr(layer, switch) or not with_experts)
        # compiled code does not call hooks that are registered after it was compiled
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for (layer, switch), disabled in zip(switches, before, strict=True):
            setattr(layer, switch, disabled)
        for module, training in modes.items():
            module.training = training
        for layer in layers:
            if isinstance(layer, LMoELinear) and layer.router is not None:
                layer.router.router_logits = None


_See = Callable[[int, Tensor], None]  # is called with the index of a gate and the rows (N, H) that it reads, in float64


def _run(model: nn.Module, gates: list[_Gate], batches: list[_Batch], see: _See) -> None:
    """Run the model on the batches of a domain, and call `see` with what each gate reads of the tokens that count."""
    mask: Tensor | None = None

    def hook(index: int, read: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.autocast(x.device.type, enabled=False):
                rows = read(x)
                rows = rows.reshape(-1, rows.shape[-1])
                if mask is not None and mask.numel() == rows.shape[0]:
                    rows = rows[mask.flatten().to(rows.device)]
                see(index, rows.to(torch.float64))

        return before

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for index, gate in enumerate(gates):
            handle = gate.module.register_forward_pre_hook(hook(index, gate.read), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            if isinstance(batch, Tensor):
                mask = None
                model(batch.to(device))
            else:
                keywords = {key: t.to(device) if isinstance(t, Tensor) else t for key, t in batch.items()}
                given = keywords.get("attention_mask")
                mask = given != 0 if isinstance(given, Tensor) and given.dim() == 2 else None
                model(**keywords)


def _solved(
    model: nn.Module, gates: list[_Gate], batches: Mapping[str, list[_Batch]], ridge: float
) -> list[tuple[Tensor, Tensor]]:
    """The weights (E, H) and biases (E) of these gates, in float64."""

    def zeros(*shape: int, of: _Gate) -> Tensor:
        return torch.zeros(*shape, device=of.weight.device, dtype=torch.float64)

    features = [gate.weight.shape[1] for gate in gates]
    products = [zeros(h, h, of=gate) for h, gate in zip(features, gates, strict=True)]
    means: list[dict[str, Tensor]] = [{} for _ in gates]
    for name, of_domain in batches.items():
        sums = [(zeros(h, h, of=gate), zeros(h, of=gate)) for h, gate in zip(features, gates, strict=True)]
        counts = [0] * len(gates)

        def see(index: int, rows: Tensor, sums: Any = sums, counts: Any = counts) -> None:
            sums[index][0].addmm_(rows.T, rows)
            sums[index][1].add_(rows.sum(dim=0))
            counts[index] += rows.shape[0]

        _run(model, gates, of_domain, see)
        for gate, product, of_gate, (squares, total), count in zip(gates, products, means, sums, counts, strict=True):
            if not count:
                fail(_OP, f"domains[{name!r}]", f"have tokens that the gate of {gate.name!r} reads", "none")
            product.add_(squares, alpha=1 / (count * len(batches)))
            of_gate[name] = total / count
    return [_solution(gate, products.pop(0), of_gate, ridge) for gate, of_gate in zip(gates, means, strict=True)]


def _solution(gate: _Gate, product: Tensor, means: Mapping[str, Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """Solve the normal equations of a gate from the mean of x x^T and the mean of x in each domain.

    One vector is taken from all rows of the weight, and one number from the biases: the gates stay the same, because they
    depend on the differences of the logits alone, and the logits become small.
    """
    of_expert = torch.stack([means[name] for name in gate.experts])
    mean = of_expert.mean(dim=0)
    if gate.bias is not None:
        product = product - mean[:, None] * mean
    targets = (of_expert - mean) / len(gate.experts)
    diagonal = product.diagonal()
    if not diagonal.sum().isfinite():
        fail(_OP, "domains", f"give finite inputs of {gate.name!r}", "NaN or infinity")
    smallest = torch.finfo(torch.float32).tiny
    product.diagonal().add_((ridge * diagonal.mean()).clamp(min=smallest))
    weight = torch.cholesky_solve(targets.T, torch.linalg.cholesky(product)).T
    return weight, -(weight @ mean)


def _measured(
    model: nn.Module,
    gates: list[_Gate],
    solved: list[tuple[Tensor, Tensor]],
    batches: Mapping[str, list[_Batch]],
    tried: tuple[float, ...],
) -> list[RouterFit]:
    """How well the solutions find the domains, with the best of the values of sharpness that are tried."""
    losses, hits = torch.zeros(len(gates), len(tried)), torch.zeros(len(gates))
    for name, of_domain in batches.items():
        of_losses, of_hits = torch.zeros_like(losses, dtype=torch.float64), torch.zeros_like(hits, dtype=torch.float64)
        counts = [0] * len(gates)

        def see(index: int, rows: Tensor, name: str = name, sums: Any = (of_losses, of_hits, counts)) -> None:
            (weight, bias), gate = solved[index], gates[index]
            logits = F.linear(rows, weight, None if gate.bias is None else bias)
            target = gate.experts.index(name)
            for i, factor in enumerate(tried):
                sums[0][index, i] -= (logits * factor).log_softmax(dim=-1)[:, target].sum().cpu()
            sums[1][index] += (logits.argmax(dim=-1) == target).sum().cpu()
            sums[2][index] += rows.shape[0]

        _run(model, gates, of_domain, see)
        each = torch.tensor(counts, dtype=torch.float64) * len(batches)
        losses, hits = losses + of_losses / each[:, None], hits + of_hits / each
    best = losses.argmin(dim=1).tolist()
    return [
        RouterFit(accuracy, of_gate[i], tried[i])
        for accuracy, of_gate, i in zip(hits.tolist(), losses.tolist(), best, strict=True)
    ]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reading(router: Router) -> Callable[[Tensor], Tensor]:
    def read(x: Tensor) -> Tensor:
        with router.sequences.without_cache():
            return router.features_read(x)

    return read
