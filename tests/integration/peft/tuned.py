"""Models with adapters of the PEFT tuner, and models with `LMoELinear` layers that hold the same tensors."""

import copy

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lmoe_kernels import LMoELinear
from lmoe_kernels.naming import set_modules
from lmoe_kernels.peft import LMoEConfig, LMoETunerLinear
from lmoe_kernels.targets import layers_with_experts
from tests.models import IDS, llama

TARGETS = ["q_proj", "down_proj"]
NAMES = [f"model.layers.{i}.{layer}" for i in (0, 1) for layer in ("self_attn.q_proj", "mlp.down_proj")]


def config(**options) -> LMoEConfig:
    given = {"num_experts": 3, "r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return LMoEConfig(**given)


def tuner_layers(model: nn.Module) -> dict[str, LMoETunerLinear]:
    return {name: layer for name, layer in layers_with_experts(model).items() if isinstance(layer, LMoETunerLinear)}


def fill(model: nn.Module, adapter: str = "default") -> None:
    """Draw the tensors that are zero at the start."""
    for layer in tuner_layers(model).values():
        if adapter in layer.mixtures():
            tensors = layer.mixtures()[adapter].tensors
            for key in {"lora_b", "gate_bias", "choice_bias"} & tensors.keys():
                nn.init.normal_(tensors[key])


def tuned(model: nn.Module | None = None, adapter: str = "default", **options) -> PeftModel:
    """A model with one filled adapter."""
    model = get_peft_model(llama() if model is None else model, config(**options), adapter)
    fill(model, adapter)
    return model


def twin(model: nn.Module, plain: nn.Module, adapter: str = "default") -> nn.Module:
    """The plain model with `LMoELinear` layers that hold the tensors of an adapter."""
    plain = copy.deepcopy(plain).requires_grad_(False)
    layers = {}
    for name, layer in tuner_layers(model).items():
        mixture = layer.mixtures()[adapter]
        layers[name] = LMoELinear.from_config(plain.get_submodule(name), mixture.config)
        layers[name].set_mixture(
            "default", mixture._replace(tensors={k: t.detach().clone() for k, t in mixture.tensors.items()})
        )
    set_modules(plain, layers)
    return plain.train(layer.training)  # a new PeftModel is in training mode, whatever the model inside is in


def logits(model: nn.Module, ids: Tensor = IDS, **options) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def steps(model: nn.Module, count: int, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    """Train, in training mode."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return optimizer


def state(model: nn.Module) -> list:
    """What an error must leave as it was: the modules, their parameters, and which of them are trained."""
    return [
        (name, id(module), [(key, id(p), p.requires_grad) for key, p in module.named_parameters(recurse=False)])
        for name, module in model.named_modules()
    ]
