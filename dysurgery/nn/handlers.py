"""Which static modules have a dynamic counterpart, and why the others have none.

A module of exactly a class in :data:`HANDLERS`, with plain parameters and that class's forward, can be replaced;
everything else is refused with a reason and never guessed. A new counterpart is a :class:`DynamicLayer` in the tuple
below.
"""

from torch import nn

from dysurgery.nn.conv import DynamicConv2d, DynamicConv2dSame
from dysurgery.nn.layer import DynamicLayer
from dysurgery.nn.linear import DynamicLinear

HANDLERS: dict[type[nn.Module], type[DynamicLayer]] = {
    layer.replaces: layer for layer in (DynamicConv2d, DynamicConv2dSame, DynamicLinear)
}


def refusal(module: nn.Module) -> str | None:
    """Return why ``module`` cannot be replaced, or None if it can."""
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized: remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
    if kind not in HANDLERS:
        return f"no handler for {kind.__module__}.{kind.__qualname__}"
    if replaced := vars(module).keys() & {"forward", "_conv_forward"}:
        return f"its {min(replaced)} was replaced on the instance (by a wrapper or an offloading hook): undo that first"
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "its weight is computed before each call (weight_norm, spectral_norm or pruning): fold that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "lazy: run the model once first"
    if not weight.is_floating_point():
        return f"no floating-point weight, but {weight.dtype}"
    return None
