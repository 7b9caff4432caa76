"""Which static modules have a dynamic counterpart, and why the others have none.

A module of a class in :data:`HANDLERS`, or of a subclass that computes what that class does, with plain parameters, can
be replaced; everything else is refused with a reason and never guessed. A new counterpart is a :class:`DynamicLayer` in
the tuple below.
"""

from torch import nn

from dysurgery.nn import conv, timm_conv
from dysurgery.nn.fold import is_reparametrised
from dysurgery.nn.layer import DynamicLayer
from dysurgery.nn.linear import DynamicLinear

HANDLERS: dict[type[nn.Module], type[DynamicLayer]] = {
    layer.replaces: layer
    for layer in (
        conv.DynamicConv1d,
        conv.DynamicConv2d,
        conv.DynamicConv3d,
        conv.DynamicConvTranspose1d,
        conv.DynamicConvTranspose2d,
        conv.DynamicConvTranspose3d,
        timm_conv.DynamicConv2dSame,
        timm_conv.DynamicStdConv2d,
        timm_conv.DynamicStdConv2dSame,
        timm_conv.DynamicScaledStdConv2d,
        timm_conv.DynamicScaledStdConv2dSame,
        DynamicLinear,
    )
}

# A subclass that defines any of these may compute something else.
_COMPUTES = ("__call__", "__getattr__", "__getattribute__", "forward", "_conv_forward", "_output_padding")


def handler(module: nn.Module) -> type[DynamicLayer] | None:
    """Return the class of the dynamic layer that can stand for ``module``, judged by its class alone.

    Many people subclass Conv2d only for a constructor of their own (torchvision's ``Conv3DSimple``): that is covered.
    """
    kind = type(module)
    known = next((base for base in kind.__mro__ if base in HANDLERS), None)
    if known is None:
        return None
    same = all(getattr(kind, name, None) is getattr(known, name, None) for name in _COMPUTES)
    return HANDLERS[known] if same else None


def refusal(module: nn.Module) -> str | None:
    """Return why ``module`` cannot be replaced, or None if it can."""
    kind = type(module)
    if is_reparametrised(module):
        return "its weight is computed before each call (weight_norm, spectral_norm, pruning ...): fold it (fold=True)"
    if handler(module) is None:
        return f"no handler for {kind.__module__}.{kind.__qualname__}"
    if replaced := vars(module).keys() & {"forward", "_conv_forward"}:
        return f"its {min(replaced)} was replaced on the instance (by a wrapper or an offloading hook): undo that first"
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "its weight is no parameter: it is computed elsewhere"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "lazy: run the model once first"
    if not weight.is_floating_point():
        return f"no floating-point weight, but {weight.dtype}"
    return None
