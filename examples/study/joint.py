"""Part (a): gate and experts are trained together on three domains, against one LoRA with as many parameters.

This is the claim of the paper on L-MoE. Learning rate and scaling of all three are tuned on a grid of the same size.
"""

import time
from collections.abc import Callable
from typing import Any

from lmoe_kernels import freeze_gates
from lmoe_kernels.options import Mixing
from study.adapters import mixture, one_lora
from study.lab import Lab
from study.language_model import balance, none
from study.log import Row, Settings
from study.method import Method

LORA_RANK = 36  # as many parameters as 8 experts of rank 4 with their gates, within 1 %
# A grid of three rates and three scalings. Where the best was in its corner, three points beyond were tried: a higher
# scaling, a lower rate, and both.
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)
SCALINGS = {"one LoRA": (4.0, 8.0, 16.0, 32.0), "factors": (16.0, 32.0, 64.0), "outputs": (32.0, 64.0, 128.0, 256.0)}
MIXINGS: tuple[Mixing, ...] = ("factors", "outputs")
CHANGES: dict[str, dict[str, Any]] = {
    "gate frozen at random": {"frozen": True},
    "no balance loss": {"balanced": False},
    "gate_init_std 0.02": {"gate_init_std": 0.02},
}


def methods() -> list[Method]:
    """The three that are compared, then the mixtures with one thing changed, then all at the default scaling."""
    compared = [Method("joint", "one LoRA", _one_lora, _grid("one LoRA"))]
    compared += [Method("joint", mixing, _mixture(mixing), _grid(mixing)) for mixing in MIXINGS]
    changed = [
        Method("joint", f"{mixing}, {name}", _mixture(mixing, **options), settings_of=mixing)
        for name, options in CHANGES.items()
        for mixing in MIXINGS
    ]
    usual = [Method("joint", "one LoRA, alpha = 2 rank", _one_lora, ({"scaling": 2.0, "rate": 3e-3},))]
    usual += [Method("joint", f"{m}, default scaling", _mixture(m), ({"scaling": 16.0, "rate": 3e-3},)) for m in MIXINGS]
    return compared + changed + usual


def _grid(name: str) -> tuple[Settings, ...]:
    scalings = SCALINGS[name]
    of_grid = [(scaling, rate) for scaling in scalings[:3] for rate in RATES[1:]]
    beyond = [(scalings[3], RATES[1]), (scalings[2], RATES[0]), (scalings[3], RATES[0])] if len(scalings) > 3 else []
    return tuple({"scaling": scaling, "rate": rate} for scaling, rate in of_grid + beyond)


def _one_lora(lab: Lab, settings: Settings) -> Row:
    started = time.perf_counter()
    model = one_lora(lab.base, LORA_RANK, settings["scaling"], lab.seed)
    lab.train(model, lab.old, lab.sizes.steps, rate=settings["rate"])
    return lab.judge(model, started, lab.old)


def _mixture(mixing: Mixing, frozen: bool = False, balanced: bool = True, **options: Any) -> Callable[[Lab, Settings], Row]:
    def run(lab: Lab, settings: Settings) -> Row:
        started = time.perf_counter()
        model = mixture(lab.base, mixing, settings["scaling"], lab.seed, **options)
        if frozen:
            freeze_gates(model)
        loss = balance if balanced and not frozen else none
        lab.train(model, lab.old, lab.sizes.steps, rate=settings["rate"], auxiliary_loss=loss)
        return lab.judge(model, started, lab.old)

    return run
