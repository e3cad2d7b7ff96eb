"""Part (c): a fourth domain comes later, when of the first three only a few windows are left. What is forgotten?"""

import time
from collections.abc import Callable

from torch import nn

from study.adapters import experts_of, one_lora
from study.composing import PREFIX, ROUTERS, compose, fit_routers, lora_on, train_routers
from study.lab import RANK, SCALING, Lab
from study.log import Row, Settings
from study.method import Method

LATER_RATE = 1e-3  # of a LoRA that is trained on, when the first three domains have been learned
TRAINED, RIDGE = "three experts, trained router", "three experts, ridge router"
LORA, LATER, REPLAY = "one LoRA on three domains", "then on bytecode", "then on bytecode and kept windows"
AFTERWARDS = "then on bytecode, then 24 steps on kept windows"
OF_LORA = (LORA, LATER, REPLAY, AFTERWARDS)
BEFORE = (LORA, TRAINED, RIDGE)  # what the rows after each of these started from


def methods() -> list[Method]:
    """Before and after, for one LoRA that is trained on and for experts that stay as they are."""
    return [
        Method("adding", LORA, _lora_before),
        Method("adding", LATER, _lora_after(replay=False)),
        Method("adding", REPLAY, _lora_after(replay=True)),
        Method("adding", AFTERWARDS, _lora_after(replay=False, steps_on_kept=24)),
        Method("adding", TRAINED, _trained(3), settings_of=PREFIX),
        Method("adding", "and a fourth, trained router", _trained(4), settings_of=PREFIX),
        Method("adding", RIDGE, _fitted(3)),
        Method("adding", "and a fourth, ridge router", _fitted(4)),
    ]


def _three(lab: Lab) -> nn.Module:
    """One LoRA that was trained on the first three domains."""
    rank = RANK * len(lab.old)
    trained = lab.cached("lora-three-domains", lambda: experts_of(lora_on(lab, lab.old, rate=1.5e-3)))
    model = one_lora(lab.base, rank, SCALING, lab.seed)
    model.load_state_dict(trained, strict=False)
    return model


def _lora_before(lab: Lab, settings: Settings) -> Row:
    started = time.perf_counter()
    return lab.judge(_three(lab), started)


def _lora_after(replay: bool, steps_on_kept: int = 0) -> Callable[[Lab, Settings], Row]:
    """The LoRA is trained on bytecode, 6 windows a step; under replay 6 of the kept windows are added to each step.

    Afterwards come steps on kept windows of all four domains.
    """

    def run(lab: Lab, settings: Settings) -> Row:
        model = _three(lab)
        started = time.perf_counter()
        new = lab.domains[3]
        sources = [new, new, new, *map(lab.kept, lab.old)] if replay else [new]
        lab.train(model, sources, lab.sizes.steps, rate=LATER_RATE, windows=12 if replay else 6)
        if steps_on_kept:
            lab.train(model, [lab.kept(domain) for domain in lab.domains], steps_on_kept, rate=LATER_RATE, windows=16)
        return lab.judge(model, started)

    return run


def _trained(experts: int) -> Callable[[Lab, Settings], Row]:
    """A router is trained on kept windows alone, of as many domains as there are experts."""

    def run(lab: Lab, settings: Settings) -> Row:
        domains = lab.domains[:experts]
        model = compose(lab, domains, **ROUTERS[PREFIX])
        started = time.perf_counter()
        train_routers(lab, model, [lab.kept(domain) for domain in domains], settings["rate"])
        return lab.judge(model, started)

    return run


def _fitted(experts: int) -> Callable[[Lab, Settings], Row]:
    """A router is fitted to kept windows by ridge regression."""

    def run(lab: Lab, settings: Settings) -> Row:
        model = compose(lab, lab.domains[:experts], **ROUTERS[PREFIX])
        started = time.perf_counter()
        fit_routers(lab, model, lab.domains[:experts])
        return lab.judge(model, started)

    return run
