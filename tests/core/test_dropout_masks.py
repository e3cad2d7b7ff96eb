"""The masks of dropout: the same bits in every backend, and fair, by statistics that see defects of the hash."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from lmoe_kernels import dispatch, lmoe, lmoe_linear, reference
from tools.far import far_apart

Mask = Callable[[Tensor, int, int, float], Tensor]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZE = 1024  # tokens and features of the masks whose statistics are taken
# Standard deviations. A normal number exceeds them with a chance of 6e-14; the variances, whose distribution has the longest
# tail, with less than 4e-11 each (Laurent and Massart's bound), so that a fair mask fails with a chance below 1e-9.
LIMIT = 7.5
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1


def _seed() -> Tensor:
    return torch.randint(_LEAST, _MOST, ())


def _rows(tokens: int, features: int, step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, step).to(dtype)[:, :features]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "features", "step"),
    [(0, 8, 8), (5, 0, 0), (1, 1, 1), (1, 4100, 4100), (37, 33, 33), (37, 33, 57), (130, 64, 72), (9, 2051, 2051)],
)
def test_every_backend_has_the_same_mask(
    tokens: int, features: int, step: int, dtype: torch.dtype, backend: str, watch
) -> None:
    """And the same numbers, bit for bit; the signs of zeros do not count."""
    dropout, rows = dispatch.load(backend).dropout, _rows(tokens, features, step, dtype)
    for seed in (_seed(), *map(torch.tensor, (0, -1, _LEAST, 1 << 32))):
        probability = float(torch.rand(()))
        result = dropout(rows, seed, probability)
        assert result.dtype == dtype
        assert result.is_contiguous()
        assert torch.equal(result, reference.dropout(rows, seed, probability))


def test_rows_that_lie_far_apart(backend: str) -> None:
    rows, seed = torch.randn(3, 40).bfloat16(), _seed()
    result = dispatch.load(backend).dropout(far_apart(rows), seed, 0.5)
    assert torch.equal(result, reference.dropout(rows, seed, 0.5))


def test_what_is_dropped_is_zero_whatever_it_was(backend: str, watch) -> None:
    rows, seed = torch.full((7, 40), float("nan")).bfloat16(), _seed()
    mask = reference.keep_mask(seed, 7, 40, 0.5)
    result = dispatch.load(backend).dropout(rows, seed, 0.5)
    assert torch.equal(result.isnan(), mask)
    assert not result[~mask].any()


@pytest.mark.parametrize("name", [*dispatch.BACKENDS])
def test_the_hash_at_the_threshold_is_kept(name: str, request: pytest.FixtureRequest) -> None:
    if name == "cuda":
        request.getfixturevalue("emulated_cuda")
    if name == "triton":
        pytest.importorskip("triton")
    seed, one, low, high = _seed(), torch.ones(1, 1), 0, 1 << 32
    while high - low > 1:  # the hash of the only element: the largest threshold that keeps it
        middle = (low + high) // 2
        low, high = (middle, high) if reference.keep_mask(seed, 1, 1, middle / 2**32) else (low, middle)
    dropout = dispatch.load(name).dropout
    assert dropout(one, seed, low / 2**32) > 0
    assert dropout(one, seed, (low + 0.999) / 2**32) > 0, "the threshold is rounded down"
    if high < 1 << 32:
        assert dropout(one, seed, high / 2**32) == 0


@pytest.mark.parametrize(
    "shape, step", [((0,), 33), ((1,), 33), ((7,), 33), ((7,), 48), ((2, 3, 4), 33)], ids=["0", "1", "7", "strided", "2x3x4"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_functions_use_that_mask(shape: tuple[int, ...], step: int, dtype: torch.dtype, every_plan: str, watch) -> None:
    """One expert whose A and B are the identity: y shows what A sees, and the gradient of x which elements get one."""
    x = torch.randn(*shape, step).to(dtype)[..., :33].requires_grad_()
    outside, seed, probability = torch.zeros(*shape, 1), _seed(), 0.4
    a, b = (torch.eye(33, dtype=dtype)[None] for _ in range(2))
    given = {"gate_logits": outside, "dropout": probability, "seed": seed, "backend": every_plan}
    flat = x.detach().reshape(-1, 33)
    expected = reference.dropout(flat, seed, probability).view(x.shape)
    for y in (lmoe(x, a, b, **given), lmoe_linear(x, torch.zeros(33, 33, dtype=dtype), None, a, b, **given)):
        assert torch.equal(y, expected)
        dy = torch.randn(x.shape).to(dtype)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, reference.dropout(dy.reshape(-1, 33), seed, probability).view(x.shape))


def _correlation(*masks: Tensor, probability: float) -> float:
    """Of some masks, in standard deviations of that of fair ones: sums of so many products are distributed normally."""
    spread = math.sqrt(probability * (1 - probability))
    products = torch.stack([(mask.double() - (1 - probability)) / spread for mask in masks]).prod(dim=0)
    return float(products.sum()) / math.sqrt(products.numel())


def _of_one(mask: Tensor, probability: float) -> Iterator[tuple[str, float]]:
    """How far the statistics of a mask are from those of a fair one, in standard deviations."""
    correlation = partial(_correlation, probability=probability)
    yield "mean", correlation(mask)
    for what, dim in (("tokens", 1), ("features", 0)):
        counts = (mask.double() - (1 - probability)).sum(dim=dim)
        counts /= math.sqrt(probability * (1 - probability) * mask.shape[dim])
        yield f"variance over the {what}", float((counts.square() - 1).mean()) * math.sqrt(len(counts) / 2)
        yield f"extreme of the {what}", float(counts.abs().max()) * 0.8  # a sum of 1024 has a longer tail than a normal one
    for step in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512):
        yield f"tokens {step} apart", correlation(mask[step:], mask[:-step])
        yield f"features {step} apart", correlation(mask[:, step:], mask[:, :-step])
        yield f"diagonals {step} apart", correlation(mask[step:, step:], mask[:-step, :-step])
        corners = (mask[i:j, k:m] for i, j in ((step, None), (0, -step)) for k, m in ((step, None), (0, -step)))
        yield f"squares of {step}", correlation(*corners)


def _of_two_seeds(keep: Mask, seed: int, probability: float) -> Iterator[tuple[str, float]]:
    """The same of two masks whose seeds differ little."""
    correlation, mask = partial(_correlation, probability=probability), keep(torch.tensor(seed), SIZE, SIZE, probability)
    others = {"next seed": seed + 1, "next high word": seed + (1 << 32), "sign": seed ^ _LEAST}
    others |= {"words exchanged": (seed << 32) + (seed >> 32 & 0xFFFFFFFF)}
    for name, number in others.items():
        signed = (number - _LEAST) % (1 << 64) + _LEAST  # the int64 of the same 64 bits
        other = keep(torch.tensor(signed), SIZE, SIZE, probability)
        yield name, correlation(mask, other)
        for step in (1, 2):
            yield f"{name}, {step} tokens later", correlation(mask[step:], other[:-step])
            yield f"{name}, {step} tokens before", correlation(mask[:-step], other[step:])
            yield f"{name}, {step} features later", correlation(mask[:, step:], other[:, :-step])


def _unfair(keep: Mask, probability: float) -> set[str]:
    """The statistics that are beyond the limit, for a random seed."""
    seed = int(_seed())
    mask = keep(torch.tensor(seed), SIZE, SIZE, probability)
    found = dict([*_of_one(mask, probability), *_of_two_seeds(keep, seed, probability)])
    assert len(found) == 77
    return {name for name, value in found.items() if abs(value) > LIMIT}


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_a_mask_is_fair(probability: float) -> None:
    assert not _unfair(reference.keep_mask, probability)


def _without_key(h: Tensor, key: object = 0, mixed: Callable[..., Tensor] = reference._mixed) -> Tensor:
    return mixed(h)


def _with_one_product(h: Tensor, key: Tensor | int = 0) -> Tensor:
    h = (h ^ h >> 17) * 0xED5AD4BB & 0xFFFFFFFF
    return h ^ h >> 11 ^ key


def _seed_plus_token(seed: Tensor, tokens: int, features: int, probability: float) -> Tensor:
    return reference.keep_mask(seed + torch.arange(tokens)[:, None], 1, features, probability)


def _as_many_of_each_token(seed: Tensor, tokens: int, features: int, probability: float) -> Tensor:
    return torch.rand(tokens, features).argsort(dim=1) >= int(probability * features)


DEFECTS: dict[str, tuple[str, Mask]] = {
    "a probability 0.004 too large": ("mean", lambda seed, t, f, p: reference.keep_mask(seed, t, f, p + 0.004)),
    "a mask of 256 tokens, repeated": (
        "tokens 256 apart",
        lambda seed, t, f, p: reference.keep_mask(seed, 256, f, p).repeat(t // 256, 1),
    ),
    "a mask for two features": (
        "features 1 apart",
        lambda seed, t, f, p: reference.keep_mask(seed, t, f // 2, p).repeat_interleave(2, dim=1),
    ),
    "half of the seed": ("next high word", lambda seed, t, f, p: reference.keep_mask(seed & 0xFFFFFFFF, t, f, p)),
    "a token that counts like a seed": ("next seed, 1 tokens later", _seed_plus_token),
    "as many kept of each token": ("variance over the tokens", _as_many_of_each_token),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect: str) -> None:
    statistic, keep = DEFECTS[defect]
    assert statistic in _unfair(keep, 0.1)


@pytest.mark.parametrize(
    ("mixed", "statistic"),
    [(_without_key, "next high word"), (_with_one_product, "features 1 apart")],
    ids=["no second key", "one product"],
)
def test_a_weaker_hash_is_seen(mixed: Callable[..., Tensor], statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_mixed", mixed)
    assert statistic in _unfair(reference.keep_mask, 0.1)
