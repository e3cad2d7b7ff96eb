"""Models whose parameters lie on several processes: which they are, and what cannot be done with them."""

from torch import nn


def why_no_new_parameters(model: nn.Module) -> str | None:
    """Why new parameters in this model would not be kept equal on all processes; None where they would."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return "in DistributedDataParallel already, which would not average the gradients of new parameters"
        if "_fsdp_wrapped_module" in module._modules:
            return "in FullyShardedDataParallel already, which would not shard new parameters"
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return "sharded already (fully_shard), which would leave new parameters out"
    return None
