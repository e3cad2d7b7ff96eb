"""One trial: the demo's frozen model gets one LoRA or a mixture, is trained for some steps, and is evaluated on two sets."""

import copy
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import lmoe_kernels as lk
from lmoe_kernels.options import Mixing

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Trial:
    """One combination of settings. One LoRA is the layer with one expert."""

    mixing: Mixing
    num_experts: int
    rank: int
    scaling: float
    learning_rate: float
    seed: int = 0
    top_k: int | None = None
    gate_init_std: float | None = None


@dataclass(frozen=True)
class Settings:
    """The settings of all trials."""

    base_steps: int = 300
    steps: int = 100
    windows: int = 6  # in a batch, of 128 bytes each
    judged: int = 40  # windows of each domain in either validation set
    random_token_steps: int = 60
    small_steps: int = 20


@dataclass(frozen=True)
class Outcome:
    """Validation bits per byte, mean over the domains; None where the training diverged."""

    trial: Trial
    chosen_by: float | None  # on the windows for choosing settings
    reported: float | None  # on windows that are not used for choosing
    likeness: float | None  # mean cosine between two experts' B; None where there is one expert


def demo(module: str) -> Any:
    """A module of the demo, whose model, text and training the trials share."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(module)


class Lab:
    """The frozen model, trained once and kept in a folder, and the text."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.demo = settings, demo("study.language_model")
        self.domains = demo("corpus").load_domains()
        torch.manual_seed(0)
        self.base = self.demo.small_llama()
        if (folder / "config.json").is_file():
            self.base = type(self.base).from_pretrained(folder)
        else:
            for _ in self.demo.training(self.base, self.domains[:1], settings.base_steps, seed=0):
                pass
            self.base.save_pretrained(folder)
        self.base.requires_grad_(False)
        windows = [domain.windows(2 * settings.judged, self.demo.LENGTH) for domain in self.domains]
        self.choosing, self.reporting = ([w[part::2] for w in windows] for part in (0, 1))

    def run(self, trial: Trial) -> Outcome:
        """Train and evaluate."""
        model = self.adapted(trial)
        mixture = trial.num_experts > 1
        options = {"rate": trial.learning_rate, "windows": self.settings.windows}
        if mixture:
            options["auxiliary_loss"] = self.demo.balance
        for _ in self.demo.training(model, self.domains, self.settings.steps, trial.seed, **options):
            pass
        bits = [self.bits(model, windows) for windows in (self.choosing, self.reporting)]
        return Outcome(trial, *bits, likeness=likeness(model) if mixture else None)

    def copy(self) -> nn.Module:
        """The frozen model, to be changed."""
        return copy.deepcopy(self.base)

    def adapted(self, trial: Trial) -> nn.Module:
        """A copy of the frozen model with the trial's adapter."""
        model = self.copy()
        torch.manual_seed(trial.seed)
        options = {
            "num_experts": trial.num_experts,
            "rank": trial.rank,
            "alpha": trial.scaling * trial.rank,
            "mixing": trial.mixing,
            "top_k": trial.top_k,
            "gate_init_std": trial.gate_init_std,
        }
        lk.apply_lmoe(model, "all-linear", output_router_logits=trial.num_experts > 1, **options)
        if trial.num_experts == 1:
            lk.freeze_gates(model)  # the gate of one expert is 1
        return model

    @torch.no_grad()
    def bits(self, model: nn.Module, windows: Sequence[Tensor]) -> float | None:
        """Bits per byte, mean over the domains."""
        nats = mean(self.demo.cross_entropy(model, w).item() for w in windows)
        return nats / math.log(2) if math.isfinite(nats) else None


@torch.no_grad()
def likeness(model: nn.Module) -> float | None:
    """The mean cosine between the B factors of two experts of a layer: 1 where all experts are one."""
    cosines = []
    for layer in lk.lmoe_layers(model).values():
        flat = nn.functional.normalize(layer.lora_b.flatten(1).double(), dim=1)
        cosines += [torch.dot(flat[i], flat[j]).item() for i, j in combinations(range(len(flat)), 2)]
    average = mean(cosines)
    return average if math.isfinite(average) else None
