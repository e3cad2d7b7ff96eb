# SPDX-License-Identifier: Apache-2.0
"""L-MoE as an adapter of PEFT. Importing this package makes the type "LMOE" known to PEFT."""

from lmoe_kernels.peft.registration import register, require_peft

require_peft()  # before the imports that need PEFT, for a clear error

from lmoe_kernels.peft.config import LMoEConfig  # noqa: E402
from lmoe_kernels.peft.layer import LMoETunerLinear  # noqa: E402
from lmoe_kernels.peft.model import LMoEModel  # noqa: E402

register(LMoEConfig, LMoEModel)

__all__ = ["LMoEConfig", "LMoEModel", "LMoETunerLinear"]
