# SPDX-License-Identifier: Apache-2.0
"""L-MoE: fused, differentiable kernels for a frozen linear layer with a mixture of LoRA experts that is gated per token."""

from lmoe_kernels.auxiliary import auxiliary_loss
from lmoe_kernels.auxiliary_trainer import add_auxiliary_loss
from lmoe_kernels.balancing import balance_callback, balance_experts
from lmoe_kernels.checkpoint import load_lmoe, save_lmoe
from lmoe_kernels.compilation import warmup
from lmoe_kernels.compose import from_lora_adapters
from lmoe_kernels.dispatch import use_backend
from lmoe_kernels.experts import add_expert, expert_names, export_expert, remove_expert
from lmoe_kernels.fitting import fit_router
from lmoe_kernels.functional import explain, lmoe, lmoe_linear
from lmoe_kernels.gate import router_logits
from lmoe_kernels.layer import LMoELinear
from lmoe_kernels.losses import balance_loss, router_z_loss
from lmoe_kernels.model import (
    apply_lmoe,
    collect_router_logits,
    disable_lmoe,
    print_trainable_parameters,
    remove_lmoe,
    train_lmoe,
)
from lmoe_kernels.options import Block
from lmoe_kernels.reader import read_lmoe
from lmoe_kernels.serving import StackedExperts, explain_stacked, lmoe_stacked_
from lmoe_kernels.targets import lmoe_layers
from lmoe_kernels.training import freeze_expert, freeze_gates, parameter_groups
from lmoe_kernels.version import __version__

__all__ = [
    "Block",
    "LMoELinear",
    "StackedExperts",
    "__version__",
    "add_auxiliary_loss",
    "add_expert",
    "apply_lmoe",
    "auxiliary_loss",
    "balance_callback",
    "balance_experts",
    "balance_loss",
    "collect_router_logits",
    "disable_lmoe",
    "expert_names",
    "explain",
    "explain_stacked",
    "export_expert",
    "fit_router",
    "freeze_expert",
    "freeze_gates",
    "from_lora_adapters",
    "lmoe",
    "lmoe_layers",
    "lmoe_linear",
    "lmoe_stacked_",
    "load_lmoe",
    "parameter_groups",
    "print_trainable_parameters",
    "read_lmoe",
    "remove_expert",
    "remove_lmoe",
    "router_logits",
    "router_z_loss",
    "save_lmoe",
    "train_lmoe",
    "use_backend",
    "warmup",
]
