"""Random problems, their true results in float64, and plain PyTorch's results."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_kernels import lmoe, lmoe_linear, reference
from lmoe_kernels.dropout import new_seed
from lmoe_kernels.options import Mixing, Options
from tools.calls import factors_of
from tools.error_rule import ORDERS, assert_no_worse, reordered
from tools.factored import factored

SHAPES = {
    "x": "TI", "lora_a": "ERI", "lora_b": "ERO", "gate_weight": "EI", "gate_bias": "E", "gate_logits": "TE",
    "weight": "OI", "bias": "O", "dy": "TO", "dlogits": "TE", "y": "TO", "router_logits": "TE",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The sizes and options of a problem, in the letters of the mathematics."""

    T: int = 7
    I: int = 33  # noqa: E741
    O: int = 41  # noqa: E741
    E: int = 5
    R: int = 3
    mixing: Mixing = "factors"
    top_k: int | None = None
    renormalize: bool = True
    shared_a: bool = False
    outside_logits: bool = False
    softmax: bool = True  # False: gate_logits are the gates, of any sign; only with outside_logits
    gate_bias: bool = False
    linear: bool = False  # with a frozen weight and bias
    scaling: float = 0.75
    dropout: float = 0.0

    @property
    def options(self) -> Options:
        """The options of the call."""
        return Options(self.scaling, self.mixing, self.top_k, self.renormalize, self.dropout, self.softmax)

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as keywords of `lmoe`."""
        return {name: value for name, value in self.options._asdict().items() if name != "softmax"}

    def __str__(self) -> str:
        options = [self.mixing]
        options += [f"top{self.top_k}"] if self.top_k else []
        options += [] if self.renormalize else ["not_renormalized"]
        options += ["dropout"] if self.dropout else []
        options += [] if self.softmax else ["gates"]
        options += [name for name in ("shared_a", "outside_logits", "gate_bias", "linear") if getattr(self, name)]
        return f"T{self.T}-I{self.I}-O{self.O}-E{self.E}-R{self.R}-" + "-".join(options)


@dataclass
class Problem:
    """A case with its tensors; `dy` and `dlogits` are the incoming gradients of y and of the router logits.

    With dropout, `mask` are the elements of x that lora_a sees; it is the mask of `seed`.
    """

    case: Case
    tensors: dict[str, Tensor]
    dy: Tensor
    dlogits: Tensor
    options: dict = field(default_factory=dict)
    seed: Tensor | None = None
    mask: Tensor | None = None

    def call(self, backend: str | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(y, router_logits) of the package's function; the given tensors replace those of the problem.

        Gates that are given are returned in place of router logits, as `lmoe` returns those of an outside router.
        """
        tensors = {**self.tensors, **tensors}
        case = self.case
        kwargs: dict[str, Any] = {
            **case.keywords, "seed": self.seed, "return_router_logits": case.softmax, "backend": backend,
        }  # fmt: skip
        kwargs |= {name: tensors[name] for name in ("gate_weight", "gate_bias", "gate_logits") if name in tensors}
        if not case.softmax:
            kwargs["gates"] = kwargs.pop("gate_logits")
        args = [tensors[name] for name in (("x", "weight", "bias") if case.linear else ("x",))]
        results = (lmoe_linear if case.linear else lmoe)(*args, tensors["lora_a"], tensors["lora_b"], **kwargs)
        return results if case.softmax else (results, tensors["gate_logits"])

    def dropped(self, x: Tensor) -> Tensor:
        """What lora_a sees, in x's dtype."""
        return x if self.mask is None else (x / (1 - self.case.dropout)).where(self.mask, 0.0)

    def of_experts(self, kept: list[int]) -> "Problem":
        """The same problem with these experts alone."""
        tensors = {
            name: t.index_select(SHAPES[name].index("E"), torch.tensor(kept)) if "E" in SHAPES[name] else t
            for name, t in self.tensors.items()
        }
        case = replace(self.case, E=len(kept))
        return replace(self, case=case, tensors=tensors, dlogits=self.dlogits[:, kept])


def good_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of `lmoe` for T=2, I=16, O=12, E=8, R=4, with some of them changed."""
    good = {
        "x": torch.randn(2, 16),
        "lora_a": torch.randn(8, 4, 16),
        "lora_b": torch.randn(8, 4, 12),
        "gate_weight": torch.randn(8, 16),
    }
    return good | changes


CASES = [
    Case(),
    Case(mixing="outputs"),
    Case(T=1, E=12, R=9),
    Case(T=0, linear=True),
    Case(E=1, R=1),
    Case(T=19, I=70, O=17, E=8, R=4, top_k=2),
    Case(T=19, I=16, O=80, E=8, R=16, top_k=3, mixing="outputs"),
    Case(T=33, I=64, O=64, E=4, R=8, linear=True),
    Case(T=40, I=48, O=50, E=6, R=5, shared_a=True),
    Case(T=12, shared_a=True, mixing="outputs", top_k=2, linear=True),
    Case(T=21, outside_logits=True),
    Case(T=9, outside_logits=True, mixing="outputs", top_k=1, linear=True),
    Case(T=130, I=136, O=72, E=3, R=9),
    Case(T=19, I=40, O=33, E=6, R=4, top_k=2, renormalize=False),
    Case(T=23, I=30, O=48, E=7, R=3, top_k=3, renormalize=False, shared_a=True, outside_logits=True),
    Case(T=9, E=4, top_k=1, renormalize=False, mixing="outputs", linear=True),
    Case(T=12, top_k=2, renormalize=False, mixing="outputs", shared_a=True),
    Case(T=37, I=64, O=64, E=6, R=4, gate_bias=True),
    Case(T=9, gate_bias=True, top_k=2, mixing="outputs", linear=True),
    Case(T=11, E=4, gate_bias=True, top_k=2, renormalize=False, shared_a=True),
    Case(T=21, I=70, outside_logits=True, softmax=False),
    Case(T=9, outside_logits=True, softmax=False, mixing="outputs", linear=True),
    Case(T=23, I=30, O=48, E=7, R=3, outside_logits=True, softmax=False, shared_a=True),
    Case(T=12, outside_logits=True, softmax=False, shared_a=True, mixing="outputs"),
]


def make_problem(case: Case, dtype: torch.dtype, param_dtype: torch.dtype | None = None, device: str = "cpu") -> Problem:
    """Draw a problem, without tokens for which a rounding could change the choice of experts."""
    experts_of_a = 1 if case.shared_a else case.E
    param_dtype = param_dtype or dtype

    def draw(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(to)

    of_features = max(case.I, 1) ** -0.5
    gate_weight = draw(case.E, case.I, scale=of_features, to=param_dtype)
    selects = case.top_k is not None and case.top_k < case.E
    pool = draw(8 * case.T + 8 if selects else case.T, case.I)
    gate_bias = draw(case.E, to=param_dtype) if case.gate_bias else None
    pool_logits = F.linear(pool.double(), gate_weight.double(), None if gate_bias is None else gate_bias.double())
    if case.outside_logits:
        pool_logits = draw(len(pool), case.E)
    keep = _clear_choices(pool_logits, case.top_k)[: case.T]
    x = pool[keep]
    tensors = {
        "x": x,
        "lora_a": draw(experts_of_a, case.R, case.I, scale=of_features, to=param_dtype),
        "lora_b": draw(case.E, case.R, case.O, scale=case.R**-0.5, to=param_dtype),
    }
    if case.outside_logits:
        tensors["gate_logits"] = pool_logits[keep]
    else:
        tensors["gate_weight"] = gate_weight
    if gate_bias is not None:
        tensors["gate_bias"] = gate_bias
    if case.linear:
        tensors |= {"weight": draw(case.O, case.I, scale=of_features), "bias": draw(case.O)}
    wide = torch.promote_types(dtype, torch.float32)
    problem = Problem(case, tensors, draw(case.T, case.O), draw(case.T, case.E, to=wide))
    if case.dropout:
        problem.seed = new_seed(x.device)
        problem.mask = reference.keep_mask(problem.seed, case.T, case.I, case.dropout)
    return problem


def _clear_choices(logits: Tensor, top_k: int | None) -> Tensor:
    """Indices of the tokens, sorted by the gap between the last kept and the first dropped logit, the widest gap first."""
    if top_k is None or top_k == logits.shape[1]:
        return torch.arange(len(logits), device=logits.device)
    ordered = logits.sort(dim=1, descending=True).values
    return (ordered[:, top_k - 1] - ordered[:, top_k]).argsort(descending=True)


def eager(problem: Problem, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Plain PyTorch's results: the factored form in x's dtype, differentiated by autograd."""
    case, x = problem.case, tensors["x"]
    factors = factors_of(tensors)
    delta, logits = factored(x, factors, case.options)
    if case.dropout:
        outside = factors._replace(gate_weight=None, gate_bias=None, gate_logits=logits)
        delta, _ = factored(problem.dropped(x), outside, case.options)
    return F.linear(x, tensors["weight"], tensors["bias"]) + delta if case.linear else delta, logits


def gradients(problem: Problem, results: tuple[Tensor, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of <y, dy> + <router_logits, dlogits> for every leaf."""
    y, logits = results
    loss = (y * problem.dy.to(y.dtype)).sum() + (logits * problem.dlogits.to(logits.dtype)).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def leaves_of(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies that require gradients."""
    return {name: t.detach().clone().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


def outcome(problem: Problem, results: tuple[Tensor, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y, router_logits and the gradient of each leaf, by name."""
    y, logits = results
    return {"y": y.detach(), "router_logits": logits.detach()} | gradients(problem, results, leaves)


def truth(problem: Problem) -> dict[str, Tensor]:
    """The results in float64: the literal definition, differentiated by autograd."""
    leaves, case = leaves_of(problem.tensors, torch.float64), problem.case
    x, factors = leaves["x"], factors_of(leaves)
    logits = factors.gate_logits if factors.gate_weight is None else F.linear(x, factors.gate_weight, factors.gate_bias)
    outside = factors._replace(gate_weight=None, gate_bias=None, gate_logits=logits)
    base = F.linear(x, leaves["weight"], leaves["bias"]) if case.linear else None
    y, _ = reference.forward(problem.dropped(x), outside, base, case.options, save=False)
    return outcome(problem, (y, logits), leaves)


def plain_pytorch(problem: Problem) -> Iterator[dict[str, Tensor]]:
    """Plain PyTorch's results in x's dtype, once for each of several orders of features, experts and ranks."""
    case, dtype = problem.case, problem.tensors["x"].dtype
    for _ in range(ORDERS):
        order = {letter: torch.randperm(getattr(case, letter), device=problem.dy.device) for letter in "IOER"}
        tensors = {name: reordered(t, SHAPES[name], order) for name, t in problem.tensors.items()}
        dy, dlogits = reordered(problem.dy, SHAPES["dy"], order), reordered(problem.dlogits, SHAPES["dlogits"], order)
        mask = None if problem.mask is None else reordered(problem.mask, SHAPES["x"], order)
        other = replace(problem, tensors=tensors, dy=dy, dlogits=dlogits, mask=mask)
        leaves = leaves_of(tensors)
        back = {letter: permutation.argsort() for letter, permutation in order.items()}
        results = outcome(other, eager(other, leaves), leaves)
        yield {name: reordered(t, SHAPES[name], back).to(dtype) for name, t in results.items()}


def assert_all_no_worse(problem: Problem, ours: dict[str, Tensor], true: dict[str, Tensor] | None = None) -> None:
    """Apply the error rule to results that are named as in `outcome`; by default the true ones are `truth(problem)`."""
    true = truth(problem) if true is None else true
    plain = list(plain_pytorch(problem))
    for name, result in ours.items():
        assert_no_worse(name, result, [outcome[name] for outcome in plain], true[name])
