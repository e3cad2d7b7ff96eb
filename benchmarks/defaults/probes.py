"""Two short measurements: how fast a mixture learns random tokens, and which share of bf16 parameters never changes."""

from statistics import mean

import torch
from torch import Tensor, nn

import lmoe_kernels as lk
from benchmarks.defaults.trials import Lab, Trial

RANDOM_TOKEN_RATE, RANDOM_TOKEN_WINDOWS = 1e-3, 2
SMALL_RATE = 2e-5
PARTS = ("lora_a", "lora_b", "gate_weight")


def random_tokens(lab: Lab, trial: Trial) -> float:
    """Loss in nats on the one batch of random bytes that the trial's adapter was trained on, at a constant learning rate."""
    model = lab.adapted(trial)
    generator = torch.Generator().manual_seed(trial.seed)
    batch = torch.randint(0, 256, (RANDOM_TOKEN_WINDOWS, lab.demo.LENGTH + 1), generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RANDOM_TOKEN_RATE, weight_decay=0.0)
    for _ in range(lab.settings.random_token_steps):
        optimizer.zero_grad()
        lab.demo.cross_entropy(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return lab.demo.cross_entropy(model, batch).item()


def unchanged(lab: Lab, dtype: torch.dtype | None, seeds: tuple[int, ...]) -> dict[str, float]:
    """The share of entries that small steps do not change in a single bit, over a bf16 base; mean over the seeds.

    Args:
        dtype: of experts and gate; None for the layer's own choice.
    """
    shares: dict[str, list[float]] = {part: [] for part in PARTS}
    for seed in seeds:
        model = nn.Module.to(lab.copy(), torch.bfloat16)
        torch.manual_seed(seed)
        lk.apply_lmoe(model, "all-linear", num_experts=8, rank=4, dtype=dtype)
        before = {name: p.detach().clone() for name, p in _trained(model).items()}
        optimizer = torch.optim.AdamW(_trained(model).values(), lr=SMALL_RATE, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(lab.settings.small_steps):
            windows = lab.demo.mixed_batch(lab.domains, generator, lab.settings.windows)
            optimizer.zero_grad()
            lab.demo.cross_entropy(model, windows).backward()
            optimizer.step()
        after = _trained(model)
        for part in PARTS:
            same = torch.cat([(after[name] == before[name]).flatten() for name in before if name.endswith(part)])
            shares[part].append(same.double().mean().item())
    return {part: mean(found) for part, found in shares.items()}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
