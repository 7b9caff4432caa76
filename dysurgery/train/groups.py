"""Parameter groups: the mixed kernel is to move as fast as the static one did.

Under SGD every kernel gets ``pi_k * g`` of the mixed kernel's gradient g, so with pi = 1/K the mix moves K times slower
than the static kernel at the same rate, and its weight decay acts as before. Banks therefore get K times the rate and
1/K of the weight decay. Adam and its like divide the size of the gradient out, and need no scaling.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dysurgery.errors import UsageError
from dysurgery.nn import DynamicLayer

# Optimizers of timm whose step is proportional to the gradient.
_PROPORTIONAL = {"sgd", "momentum", "nesterov", "nesterovw", "sgdw", "sgdp"}


def parameter_groups(
    model: nn.Module,
    opt: str,
    lr: float,
    weight_decay: float,
    *,
    bank_lr: float | None = None,
    attention_lr: float = 1.0,
    attention_weight_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the parameter groups of ``model`` for an optimizer called ``opt``, those that require a gradient.

    Vectors and scalars (biases, BatchNorm) get no weight decay, as in timm.

    Args:
        model: static or dynamic.
        opt: a name of timm's.
        lr: of everything that has no factor.
        weight_decay: of everything that has no factor.
        bank_lr: factor on the rate and divisor of the weight decay of the banks; None is the layer's K under SGD and
            its like, else 1. 0 freezes them.
        attention_lr: factor on the rate of the attention.
        attention_weight_decay: factor on its weight decay.
    """
    proportional = opt.lower() in _PROPORTIONAL
    factors: dict[int, tuple[float, float]] = {}
    for layer in model.modules():
        if isinstance(layer, DynamicLayer):
            scale = bank_lr if bank_lr is not None else float(layer.k) if proportional else 1.0
            for bank in (layer.bank, layer.bias_bank):
                if bank is not None:
                    factors[id(bank)] = (scale, 1.0 / scale if scale else 0.0)
            for parameter in layer.gate.parameters():
                factors[id(parameter)] = (attention_lr, attention_weight_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay = factors.get(id(parameter), (1.0, 1.0))
            decays = parameter.ndim > 1 and not name.endswith("bias_bank")
            groups.setdefault((rate, decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * rate, "weight_decay": weight_decay * decay}
        for (rate, decay), parameters in groups.items()
    ]


def freeze(model: nn.Module, train: str) -> None:
    """Let only the parameters train that ``train`` names: ``all``, ``dynamic`` (banks and attention), ``attention``.

    Those that were frozen stay frozen.

    Raises:
        UsageError: if nothing is left to train.
    """
    if train != "all":
        layers = [layer for layer in model.modules() if isinstance(layer, DynamicLayer)]
        parts = layers if train == "dynamic" else [layer.gate for layer in layers]
        freeze_all_but(model, (parameter for part in parts for parameter in part.parameters()))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"nothing to train: the model has no parameter that train = {train!r} names and is not frozen")


def freeze_all_but(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze what is not among ``parameters``; those that were frozen stay frozen."""
    kept = {id(parameter) for parameter in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
