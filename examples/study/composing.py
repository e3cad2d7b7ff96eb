"""Part (b): LoRAs that were trained apart, each on one domain, become the frozen experts of one model."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from corpus import Domain
from torch import nn

from lmoe_kernels import fit_router
from study.adapters import composed, one_lora
from study.lab import RANK, SCALING, Lab
from study.language_model import Source
from study.log import Row, Settings
from study.method import Method

GATE_WINDOWS = 16  # in a batch of the gates' training
GATE_RATES: tuple[Settings, ...] = ({"rate": 3e-3}, {"rate": 1e-2}, {"rate": 3e-2})
LORA_RATES: tuple[Settings, ...] = ({"rate": 1.5e-3}, {"rate": 3e-3})
AVERAGE, ORACLE, ALONE = "uniform average", "oracle: each domain its own LoRA", "best single LoRA"
REFERENCES = ("frozen base", ALONE, AVERAGE, ORACLE)  # rows without a gate
DOMAINS = ("English", "Python", "C", "Bytecode")
TOKEN, PREFIX = "a gate per layer, on the token", "a router per block, on the prefix"
BLOCK_TOKEN, MODEL_PREFIX = "a router per block, on the token", "one router, on the prefix"
# The routers, by the options of `apply_lmoe`.
ROUTERS: dict[str, dict[str, Any]] = {
    TOKEN: {},
    BLOCK_TOKEN: {"router": "block"},
    PREFIX: {"router": "block", "router_reads": "prefix"},
    MODEL_PREFIX: {"router": "model", "router_reads": "prefix"},
}
RIDGE = "by ridge regression"  # after the name of a router: it is not trained, but fitted to kept windows
EVERYTHING = "one LoRA trained on all domains"


def methods() -> list[Method]:
    """From the frozen base to the LoRA that has seen everything."""
    return [
        Method("composing", "base", _base),
        *(Method("composing", f"LoRA of {name}", _alone(name)) for name in DOMAINS),
        Method("composing", AVERAGE, _average),
        Method("composing", EVERYTHING, _everything, LORA_RATES),
        *(Method("composing", name, _trained(ROUTERS[name]), GATE_RATES) for name in (TOKEN, PREFIX)),
        *(Method("composing", name, _trained(ROUTERS[name]), settings_of=PREFIX) for name in (BLOCK_TOKEN, MODEL_PREFIX)),
        *(Method("composing", f"{name}, {RIDGE}", _fitted(routing)) for name, routing in ROUTERS.items()),
    ]


def compose(lab: Lab, domains: Sequence[Domain], **routing: Any) -> nn.Module:
    """The LoRAs of these domains as the experts of one model."""
    return composed(lab.base, {domain.name: lab.lora(domain) for domain in domains}, SCALING, **routing)


def train_routers(lab: Lab, model: nn.Module, sources: Sequence[Source], rate: float) -> None:
    """Train what the experts' freezing has left: gates or routers."""
    lab.train(model, sources, lab.sizes.gate_steps, rate=rate, windows=GATE_WINDOWS // len(sources) * len(sources))


def fit_routers(lab: Lab, model: nn.Module, domains: Sequence[Domain]) -> None:
    """Fit gates or routers by ridge regression to the kept windows of the domains, without a gradient step."""
    fit_router(model, {domain.name: [lab.kept(domain).windows[:, :-1]] for domain in domains})


def lora_on(lab: Lab, domains: Sequence[Domain], rate: float) -> nn.Module:
    """One LoRA with as many parameters as those of the domains together, trained on as many windows as they were."""
    model = one_lora(lab.base, RANK * len(domains), SCALING, lab.seed)
    per_domain = 2
    steps = lab.sizes.steps * 6 // per_domain
    lab.train(model, domains, steps, rate=rate, windows=per_domain * len(domains))
    return model


def _base(lab: Lab, settings: Settings) -> Row:
    return lab.judge(lab.base, time.perf_counter())


def _alone(name: str) -> Callable[[Lab, Settings], Row]:
    def run(lab: Lab, settings: Settings) -> Row:
        started = time.perf_counter()
        model = one_lora(lab.base, RANK, SCALING, lab.seed)
        domain = next(domain for domain in lab.domains if domain.name == name)
        model.load_state_dict(lab.lora(domain), strict=False)
        return lab.judge(model, started)

    return run


def _average(lab: Lab, settings: Settings) -> Row:
    started = time.perf_counter()
    return lab.judge(compose(lab, lab.domains), started, parameters=0)


def _everything(lab: Lab, settings: Settings) -> Row:
    started = time.perf_counter()
    return lab.judge(lora_on(lab, lab.domains, settings["rate"]), started)


def _trained(routing: dict[str, Any]) -> Callable[[Lab, Settings], Row]:
    def run(lab: Lab, settings: Settings) -> Row:
        model = compose(lab, lab.domains, **routing)
        started = time.perf_counter()
        train_routers(lab, model, lab.domains, settings["rate"])
        return lab.judge(model, started)

    return run


def _fitted(routing: dict[str, Any]) -> Callable[[Lab, Settings], Row]:
    def run(lab: Lab, settings: Settings) -> Row:
        model = compose(lab, lab.domains, **routing)
        started = time.perf_counter()
        fit_routers(lab, model, lab.domains)
        return lab.judge(model, started)

    return run
