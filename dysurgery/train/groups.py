"""Parameter groups: the mixed kernel is to move as fast as the static one did.

Under SGD every kernel gets ``pi_k * g`` of the mixed kernel's gradient g, so with pi = 1/K the mix moves K times slower
than the static kernel at the same rate, and its weight decay acts as before. Banks therefore get K times the rate and
1/K of the weight decay. Adam and its like divide the size of the gradient out, and need no scaling.
"""

from typing import Any

from torch import nn

from dysurgery.nn import DynamicLayer

# Optimizers of timm whose step is proportional to the gradient.
_PROPORTIONAL = {"sgd", "momentum", "nesterov", "nesterovw", "sgdw", "sgdp"}


def parameter_groups(model: nn.Module, opt: str, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of ``model`` for an optimizer called ``opt``, those that require a gradient.

    Vectors and scalars (biases, BatchNorm) get no weight decay, as in timm.
    """
    factor = opt.lower() in _PROPORTIONAL
    banks = {
        id(bank): layer.k if factor else 1
        for layer in model.modules()
        if isinstance(layer, DynamicLayer)
        for bank in (layer.bank, layer.bias_bank)
        if bank is not None
    }
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith("bias_bank")
            groups.setdefault((banks.get(id(parameter), 1), decays), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * k, "weight_decay": weight_decay / k if decays else 0.0}
        for (k, decays), parameters in groups.items()
    ]
