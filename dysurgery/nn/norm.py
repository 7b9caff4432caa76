"""BatchNorm as what it is in eval mode: one factor and one shift for each channel, which the layer before can take in.

``norm(conv(x)) = scale * conv(x) + shift`` with ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale``
(Jacob et al., CVPR 2018, section 3.2). Of a dynamic layer each of the K kernels is scaled and each of the K biases
scaled and shifted, which is exact where the weights pi sum to one. Called by :mod:`dysurgery.fuse`, which knows where
that may be done, and by :mod:`dysurgery.checkpoint`, which builds the result again.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dysurgery.nn.handlers import handler
from dysurgery.nn.layer import BIAS_ADDED, DynamicLayer

NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct,
    FrozenBatchNorm2d, FrozenBatchNormAct2d,
)  # fmt: skip
"""What counts as a BatchNorm; timm's ``...Act`` also drop and activate."""


class FusedNorm(nn.Sequential):
    """Stands where a BatchNorm was that the layer before has taken in: nothing is left but timm's drop and activation.

    Args:
        norm: an instance of :data:`NORMS`; its drop and activation are taken over, under their names.
    """

    def __init__(self, norm: nn.Module) -> None:
        children = ((name, norm._modules.get(name)) for name in ("drop", "act"))
        super().__init__(OrderedDict((name, child) for name, child in children if child is not None))
        self.train(norm.training)


def norm_refusal(norm: nn.Module) -> str | None:
    """Return why a BatchNorm cannot be folded into what is before it, or None if it can."""
    kind = type(norm)
    known = next(base for base in kind.__mro__ if base in NORMS)
    if getattr(kind, "forward", None) is not getattr(known, "forward", None) or "forward" in vars(norm):
        return f"{kind.__name__} may compute something of its own"
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        return "it has no running statistics (track_running_stats=False)"
    if norm._forward_pre_hooks:
        return "a hook sees what goes into it"
    return None


def layer_refusal(layer: nn.Module) -> str | None:
    """Return why a layer (dynamic, or static with a handler) cannot take a BatchNorm in, or None if it can."""
    kind = type(layer) if isinstance(layer, DynamicLayer) else handler(layer)
    if kind is None:
        return f"the layer before is a {type(layer).__name__}, for which there is no handler"
    if kind.kernels is not DynamicLayer.kernels:
        return "the layer before standardises its kernels at each call"
    if isinstance(layer, DynamicLayer) and not layer.gate.sums_to_one:
        return f"the layer before has the {layer.gate.name} gate, whose weights do not sum to 1"
    if layer._forward_hooks:
        return "a hook sees the output of the layer before"
    return None


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what ``norm`` does in eval mode to each of its C channels: factors (C,) and shifts (C,), in float64."""
    mean, var = (getattr(norm, name).detach().cpu().double() for name in ("running_mean", "running_var"))
    gamma, beta = (getattr(norm, name, None) for name in ("weight", "bias"))
    scale = (var + norm.eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.detach().cpu().double()
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta.detach().cpu().double()
    return scale, shift


def absorb(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make ``layer``, in place, return ``scale * y + shift`` where it returned y.

    Its parameters are new ones: whoever else holds the old ones is not disturbed.

    Args:
        layer: dynamic, or static; :func:`layer_refusal` says whether it may.
        scale: (Cout,) in float64.
        shift: (Cout,) in float64.
    """
    add_bias(layer)
    dynamic = isinstance(layer, DynamicLayer)
    weight, bias = ("bank", "bias_bank") if dynamic else ("weight", "bias")
    shape = layer.weight_shape if isinstance(layer, DynamicLayer) else tuple(layer.get_parameter(weight).shape)
    factors = scale.view(-1, *(1 for _ in shape[1:]))
    if getattr(layer, "transposed", False):
        # (Cin, Cout/groups, ...): the inputs of group g lead to the g-th part of the outputs.
        groups = int(getattr(layer, "groups", 1))
        parts = scale.view(groups, 1, shape[1]).expand(groups, shape[0] // groups, shape[1])
        factors = parts.reshape(*shape[:2], *(1 for _ in shape[2:]))
    if dynamic:
        factors = factors.expand(shape).reshape(-1)
    _replace(layer, weight, lambda old: old * factors)
    _replace(layer, bias, lambda old: old * scale + shift)


def _replace(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    old = layer.get_parameter(name)
    new = torch.empty_like(old)  # keeps channels_last
    new.copy_(change(old.detach().cpu().double()))
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))


def add_bias(layer: nn.Module) -> None:
    """Give a layer without a bias (or bias bank) one of zeros, in place, and mark it as :data:`BIAS_ADDED`."""
    dynamic = isinstance(layer, DynamicLayer)
    weight, bias = ("bank", "bias_bank") if dynamic else ("weight", "bias")
    if layer._parameters[bias] is not None:
        return
    like = layer.get_parameter(weight)
    channels = getattr(layer, "out_channels", None) or int(layer.out_features)  # type: ignore[arg-type]
    shape = (layer.k, channels) if isinstance(layer, DynamicLayer) else (channels,)
    setattr(layer, bias, nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad))
    vars(layer)[BIAS_ADDED] = True
