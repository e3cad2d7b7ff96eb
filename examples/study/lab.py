"""What the trials share: the text, the frozen models, the LoRAs that were trained apart, and how a model is judged."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from corpus import Domain
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from study.adapters import Experts, experts_of, one_lora
from study.language_model import LENGTH, AuxiliaryLoss, Source, bits_per_byte, none, small_llama, trainable, training
from study.log import Row


@dataclass(frozen=True)
class Sizes:
    """Steps and windows of the study."""

    base_steps: int = 600  # of 6 windows of English
    steps: int = 200  # of 6 windows
    gate_steps: int = 50  # of 16 windows
    kept: int = 16  # windows of each domain's training part that are kept for later
    chosen_by: int = 48  # windows of each domain that choose settings
    judged: int = 96  # other windows of each domain, whose loss is reported


TINY = Sizes(base_steps=2, steps=2, gate_steps=2, kept=4, chosen_by=2, judged=4)
RANK, SCALING = 16, 8.0  # of each LoRA that is trained apart


@dataclass(frozen=True)
class Kept:
    """A few windows of a domain, (n, LENGTH + 1) int64, which are all that is left of its training part."""

    name: str
    windows: Tensor

    def batch(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Random ones of the windows."""
        return self.windows[torch.randint(len(self.windows), (count,), generator=generator), : length + 1]


class Lab:
    """The trials' text, and the models of one seed: the base, which is trained on English and frozen, and what adapts it."""

    def __init__(self, sizes: Sizes, domains: list[Domain], models: Path, seed: int, device: str) -> None:
        self.sizes, self.models, self.seed, self.device = sizes, models, seed, device
        self.domains, self.old = domains, domains[:3]
        count = sizes.chosen_by + sizes.judged
        windows = {d.name: d.windows(count, LENGTH) for d in self.domains}
        choosing = torch.arange(count) % (count // sizes.chosen_by) == 0
        self.choosing = {name: w[choosing] for name, w in windows.items()}
        self.judging = {name: w[~choosing] for name, w in windows.items()}
        self.label = ""  # what the progress bar shows
        self.base = self._base()

    def kept(self, domain: Domain) -> Kept:
        """The windows of a domain that are kept, the same at every call."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        return Kept(domain.name, domain.batch(self.sizes.kept, LENGTH, generator))

    def lora(self, domain: Domain) -> Experts:
        """The LoRA that was trained on this domain alone."""

        def make() -> Experts:
            model = one_lora(self.base, RANK, SCALING, self.seed)
            self.train(model, [domain], self.sizes.steps, windows=6)
            return experts_of(model)

        return self.cached(f"lora-{domain.name}", make)

    def cached(self, name: str, make: Callable[[], Experts]) -> Experts:
        """What `make` returns, kept in a file."""
        path = self.models / f"{name}-{self.seed}.safetensors"
        if not path.is_file():
            self.models.mkdir(parents=True, exist_ok=True)
            save_file(make(), path)
        return {key: tensor.to(self.device) for key, tensor in load_file(path).items()}

    def train(
        self,
        model: nn.Module,
        sources: Sequence[Source],
        steps: int,
        *,
        rate: float = 3e-3,
        windows: int = 6,
        auxiliary_loss: AuxiliaryLoss = none,
    ) -> None:
        """Train what is not frozen, with a progress bar."""
        losses = training(model, sources, steps, self.seed, auxiliary_loss, rate, windows)
        for _ in tqdm(losses, total=steps, desc=self.label, unit="step", leave=False, mininterval=1.0, file=sys.stderr):
            pass

    def judge(self, model: nn.Module, started: float, domains: Sequence[Domain] = (), parameters: int | None = None) -> Row:
        """The result of a trial that began at `started`.

        Args:
            model: the trained model.
            started: what `time.perf_counter` gave before the trial.
            domains: those of the trial; all if empty.
            parameters: how many were trained, if not those that still require a gradient.
        """
        seconds = time.perf_counter() - started
        names = [domain.name for domain in domains or self.domains]
        chosen_by = bits_per_byte(model, {name: self.choosing[name] for name in names})
        return {
            "bits": bits_per_byte(model, {name: self.judging[name] for name in names}),
            "chosen_by": mean_of(chosen_by),
            "parameters": trainable(model) if parameters is None else parameters,
            "seconds": round(seconds, 1),
        }

    def _base(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = small_llama()

        def make() -> Experts:
            self.label = f"base on English, seed {self.seed}"
            nn.Module.to(model, self.device)
            self.train(model, self.domains[:1], self.sizes.base_steps, windows=6)
            return experts_of(model)

        model.load_state_dict(self.cached("base", make), strict=False)
        return nn.Module.to(model, self.device).requires_grad_(False)


def mean_of(bits: Mapping[str, float | None], names: Sequence[str] = ()) -> float | None:
    """The mean over some of the domains, or over all; None where one of them has no finite loss."""
    values = [bits[name] for name in names or bits]
    return None if None in values else round(mean(value for value in values if value is not None), 4)
