"""Which trials are run: a grid on one seed, then the best of the grid and the candidates for a default on all seeds."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from benchmarks.defaults.trials import Outcome, Trial
from lmoe_kernels import LMoELinear
from lmoe_kernels.options import Mixing

Method = Literal["LoRA"] | Mixing

MIXINGS: tuple[Mixing, ...] = ("factors", "outputs")
METHODS: tuple[Method, ...] = ("LoRA", *MIXINGS)
EXPERTS, RANK = 8, 4
RANK_OF_LORA = 36  # 354,816 trained parameters; 8 experts of rank 4 and their gates have 351,232
USUAL = 3e-3  # the learning rate of all trials that vary something else

Grid = Mapping[Method, Mapping[float, tuple[float, ...]]]  # method, then learning rate, to scalings


def _grid() -> Grid:
    """Wide enough that the best point is not at an edge, without points that certainly diverge."""
    one = dict.fromkeys((1e-3, 3e-3, 1e-2), (1.0, 2.0, 4.0, 8.0, 16.0))
    mixture = {
        1e-3: (8.0, 16.0), 3e-3: (1.0, 8.0, 16.0, 32.0, 64.0, 128.0), 1e-2: (8.0, 16.0),
    }  # fmt: skip
    return {"LoRA": one, "factors": mixture, "outputs": mixture}


def _candidates() -> Mapping[Method, tuple[float, ...]]:
    return {"LoRA": (2.0,), "factors": (8.0, 16.0), "outputs": (8.0, 16.0)}


@dataclass(frozen=True)
class Plan:
    """What is varied, one stage after the other."""

    seeds: tuple[int, ...] = (0, 1, 2)
    grid: Grid = field(default_factory=_grid)
    candidates: Mapping[Method, tuple[float, ...]] = field(default_factory=_candidates)  # for a default
    experts: tuple[int, ...] = (4, 8, 16)
    scalings_over_experts: tuple[float, ...] = (1.0, 2.0, 4.0)
    scalings_of_top_2: tuple[float, ...] = (2.0, 4.0, 8.0)
    gate_init_stds: tuple[float | None, ...] = (0.02, None, 0.5)  # None: .09 and, for down_proj, .05

    def stages(self, outcomes: list[Outcome]) -> Iterator[tuple[str, list[Trial]]]:
        """Name and trials of every stage; the trials of a stage may depend on the outcomes of earlier stages."""
        yield "learning rate and scaling", list(self.tuning())
        yield "other seeds", list(self.repeats(outcomes))
        yield "other numbers of experts", list(self.other_sizes())
        yield "two experts a token", list(self.top_2())
        yield "gate at the start", list(self.gates())

    def tuning(self) -> Iterator[Trial]:
        """Learning rate and scaling of every method, on the first seed."""
        for method in METHODS:
            for rate, scalings in self.grid[method].items():
                yield from (point(method, scaling, rate, self.seeds[0]) for scaling in scalings)

    def repeats(self, outcomes: Iterable[Outcome]) -> Iterator[Trial]:
        """The best of the tuning, and the candidates for a default, on the other seeds."""
        known = list(outcomes)
        for seed in self.seeds[1:]:
            yield from (replace(self.best(known, method).trial, seed=seed) for method in METHODS)
            yield from (point(method, scaling, USUAL, seed) for method in METHODS for scaling in self.candidates[method])

    def other_sizes(self) -> Iterator[Trial]:
        """Scalings proportional to the number of experts, at a constant number of parameters."""
        for mixing in MIXINGS:
            for experts in self.experts:
                rank = EXPERTS * RANK // experts
                yield from (Trial(mixing, experts, rank, k * experts, USUAL) for k in self.scalings_over_experts)

    def top_2(self) -> Iterator[Trial]:
        """Two experts of eight for each token."""
        for mixing in MIXINGS:
            yield from (Trial(mixing, EXPERTS, RANK, scaling, USUAL, top_k=2) for scaling in self.scalings_of_top_2)

    def gates(self) -> Iterator[Trial]:
        """Other gates at the start, under the layer's default scaling."""
        for mixing in MIXINGS:
            start = point(mixing, default_scaling(mixing), USUAL, self.seeds[0])
            yield from (replace(start, gate_init_std=std) for std in self.gate_init_stds)

    def best(self, outcomes: Iterable[Outcome], method: Method) -> Outcome:
        """The best point of the grid on the windows for choosing."""
        grid = {trial for trial in self.tuning() if method_of(trial) == method}
        found = [(o.chosen_by, o) for o in outcomes if o.trial in grid and o.chosen_by is not None]
        return min(found, key=lambda pair: pair[0])[1]


FULL = Plan()
QUICK = Plan(
    seeds=(0, 1), grid={method: {USUAL: (8.0,)} for method in METHODS}, candidates=dict.fromkeys(METHODS, (8.0,)),
    experts=(2,), scalings_over_experts=(1.0,), scalings_of_top_2=(2.0,), gate_init_stds=(0.02, None),
)  # fmt: skip


def point(method: Method, scaling: float, rate: float, seed: int = 0) -> Trial:
    """A trial of the grid. All methods train about 353,000 parameters."""
    if method == "LoRA":
        return Trial("factors", 1, RANK_OF_LORA, scaling, rate, seed)
    return Trial(method, EXPERTS, RANK, scaling, rate, seed)


def method_of(trial: Trial) -> Method:
    """The method that a trial belongs to."""
    return "LoRA" if trial.num_experts == 1 else trial.mixing


def default_scaling(method: Method) -> float:
    """The scaling of a layer without `alpha`, at the grid's sizes."""
    like = point(method, 1.0, USUAL)
    return LMoELinear(1, 1, num_experts=like.num_experts, rank=like.rank, mixing=like.mixing).scaling
