# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels of a model before it runs."""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lmoe_kernels import checks, dispatch
from lmoe_kernels.checks import fail
from lmoe_kernels.linears import is_plain_linear, weight_of
from lmoe_kernels.mixture import LayerWithExperts, Mixture
from lmoe_kernels.options import Factors, Options, Problem, Sizes, Wanted
from lmoe_kernels.targets import layers_with_experts

_Item = TypeVar("_Item")
_TILE = 64  # tokens


def warmup(
    model: nn.Module,
    tokens: int | Iterable[int],
    *,
    dtype: torch.dtype | None = None,
    backward: bool = True,
    processes: int | None = None,
) -> int:
    """Compile and load all Triton kernels that a model's L-MoE layers need, so that no later call waits for a compiler.

    The kernels depend on the sizes, the dtypes and the options of a layer and, in steps, on the number of tokens of a call.
    They are compiled in parallel processes, which do not use the GPU, and kept in Triton's cache on the disk: a second run
    of the program only loads them. The layers do not change, and no parameter gets a gradient. Layers with dropout compute
    something else in evaluation, and are taken to have backward passes in training alone.

    Args:
        model: a model with L-MoE layers on its device, before FSDP shards it.
        tokens: how many tokens the calls will have (batch times sequence length): a number or several, as in
            `range(1, 4097)`. Numbers that need the same kernels cost no more than one of them.
        dtype: dtype of the activations; None for that of each frozen layer. Pass the autocast dtype if the model runs under
            autocast, and the compute dtype if its layers are quantised.
        backward: whether there will be backward passes, for the parameters that require a gradient now.
        processes: how many processes compile; None for one for each processor, 16 at most.

    Returns:
        the number of kernels that are now ready. It is 0 if no call uses the `triton` backend, as on a CPU: see `explain`.

    Raises:
        ValueError: the model has no L-MoE layers, a number is not positive, or a layer's backend cannot take its calls.
        TypeError: an argument has the wrong type, or a layer needs `dtype`.

    Example:
        model = load_model().cuda()
        warmup(model, tokens=range(1, 8193), backward=False)
    """
    if not isinstance(model, nn.Module):
        fail("warmup", "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    numbers = _numbers(tokens)
    if dtype is not None and dtype not in checks.DTYPES:
        fail("warmup", "dtype", f"be None or one of {', '.join(map(str, checks.DTYPES))}", dtype, TypeError)
    checks.check_bool("warmup", "backward", backward)
    if processes is not None:
        checks.check_positive_int("warmup", "processes", processes)
    sources = [source for name, layer in layers_with_experts(model).items() for source in _sources(name, layer)]
    if not sources:
        fail("warmup", "model", "have L-MoE layers", "none")
    kinds = dict.fromkeys(kind for source in sources for kind in _kinds(source, dtype, backward))
    found = _of_triton(kinds, numbers)
    if not found:
        return 0
    # Triton is installed, since its backend takes a call.
    from lmoe_kernels.backends.triton import precompile

    most = processes or precompile.most_processes()
    return sum(
        precompile.ready([precompile.Call(*call) for call in calls], device, most, _with_bar)
        for device, calls in found.items()
    )


class _Kind(NamedTuple):
    """What decides the kernels of a layer, in addition to the number of tokens."""

    device: torch.device
    backend: str  # a name or "auto"
    call: tuple[Any, ...]  # the fields of the `Call` of lmoe_kernels.backends.triton.precompile, for no tokens


def _numbers(tokens: int | Iterable[int]) -> list[int]:
    """The numbers of tokens that are looked at."""
    numbers = [tokens] if isinstance(tokens, int) else list(tokens) if isinstance(tokens, Iterable) else None
    if numbers is None:
        fail("warmup", "tokens", "be an int or several", type(tokens).__name__, TypeError)
    if not numbers:
        fail("warmup", "tokens", "be at least one number", "none")
    for number in numbers:
        checks.check_positive_int("warmup", "tokens", number)
    return _thinned(numbers)


def _thinned(numbers: Iterable[int]) -> list[int]:
    """The numbers whose plans are looked at, since making a plan takes up to a millisecond.

    A plan changes with the number of tiles, of 64 tokens or more, or else slowly: the first and the last number of each tile
    stand for those in between.
    """
    of_tile: dict[int, list[int]] = {}
    for number in numbers:
        of_tile.setdefault(-(-number // _TILE) if number > _TILE else -number, []).append(number)
    return [number for tile in of_tile.values() for number in sorted({min(tile), max(tile)})]


class _Source(NamedTuple):
    """A call that a layer makes."""

    layer: str
    frozen: nn.Module
    adds: bool  # to the output of another adapter, and not to that of the frozen layer
    mixture: Mixture
    trains_router: bool  # whether the layer shares a router that is trained


def _sources(name: str, layer: LayerWithExperts) -> list[_Source]:
    """The calls of a layer. Each adapter of PEFT may be the first active one; the further active ones add to its output."""
    mixtures, frozen = layer.mixtures(), layer.wrapped()

    def source(adapter: str, adds: bool) -> _Source:
        trained = any(tensor.requires_grad for tensor in layer.gate(adapter).values())
        return _Source(name, frozen, adds, mixtures[adapter], trained and not mixtures[adapter].config.own_gate)

    return [source(adapter, False) for adapter in mixtures] + [source(adapter, True) for adapter in layer.active()[1:]]


def _kinds(source: _Source, dtype: torch.dtype | None, backward: bool) -> Iterator[_Kind]:
    """What a call computes; with dropout that is one thing in training, and another in evaluation."""
    name, frozen, _, (config, given), _ = source
    of_weight = weight_of(frozen).dtype
    if dtype is None and of_weight not in checks.DTYPES:
        must = "be given for layers whose weight does not have the dtype of their activations"
        fail("warmup", "dtype", must, f"None for {name!r} with a weight of {of_weight}", TypeError)
    dtype = dtype or of_weight
    for key, tensor in given.items():
        if tensor.dtype not in (dtype, torch.float32):
            must = f"have dtype {dtype} like the activations, or torch.float32"
            fail("warmup", f"{name}.{key}".strip("."), must, tensor.dtype, TypeError)
    modes = [(config.dropout, True), (0.0, False)] if backward and config.dropout > 0 else [(0.0, backward)]
    requested = dispatch.requested_backend("warmup", config.backend)
    for dropout, has_backward in modes:
        yield _Kind(given["lora_a"].device, requested, _call(source, dtype, dropout, has_backward))


def _call(source: _Source, dtype: torch.dtype, dropout: float, backward: bool) -> tuple[Any, ...]:
    """The fields of a `Call`. The backend gets router logits with dropout, a bias of the choice, or a shared router."""
    _, frozen, adds, (config, given), trains_router = source
    lora_a, lora_b = given["lora_a"], given["lora_b"]
    dtypes = tuple(given[key].dtype if key in given else None for key in Factors._fields)
    trained = [backward and key in given and given[key].requires_grad for key in Factors._fields]
    if dropout > 0 or config.choice_bias or not config.own_gate:
        dtypes = (*dtypes[:2], None, None, torch.promote_types(dtype, torch.float32))
        trained = [*trained[:2], False, False, any(trained) or (backward and trains_router)]
    assert config.alpha is not None
    return (
        Sizes(0, lora_a.shape[2], lora_b.shape[2], config.num_experts, config.rank, lora_a.shape[0]),
        dtype,
        dtypes,
        2 if adds or not is_plain_linear(frozen) else 0 if frozen.bias is None else 1,
        Options(config.alpha / config.rank, config.mixing, config.top_k, config.renormalize, dropout),
        config.output_router_logits,
        Wanted(any(trained), *trained),
    )


def _of_triton(kinds: Iterable[_Kind], numbers: list[int]) -> dict[torch.device, list[tuple[Any, ...]]]:
    """The fields of the calls that the `triton` backend will compute, by device."""
    found: dict[torch.device, list[tuple[Any, ...]]] = {}
    for (device, backend, (sizes, dtype, *rest)), number in product(kinds, numbers):
        sizes = sizes._replace(T=number)
        if dispatch.choose("warmup", Problem(sizes, dtype, device), backend) == "triton":
            found.setdefault(device, []).append((sizes, dtype, *rest))
    return found


def _with_bar(items: Iterable[_Item], total: int) -> Iterable[_Item]:
    """The items, with a progress bar on a terminal if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc="Triton kernels", unit="kernel", disable=None, leave=False)
