"""Dynamic counterparts of timm's own convolutions: TensorFlow's padding, and standardised kernels.

A standardised convolution (Qiao et al., arXiv 1903.10520; Brock et al., arXiv 2101.08692) gives each output channel of
its kernel mean 0 and variance 1 before it convolves. Here each of the K kernels is standardised so, and then mixed:
equal kernels give what the static layer gives.
"""

from typing import Self

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from dysurgery.nn.conv import DynamicConv2d


class DynamicConv2dSame(DynamicConv2d):
    """For timm's ``Conv2dSame``: TensorFlow's padding, which depends on the input's size."""

    replaces = Conv2dSame

    def plain(self) -> nn.Module:
        return _same(self)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        # timm pads first and then convolves with self.padding, which is (0, 0).
        return pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)), (0, 0)


def _same(layer: DynamicConv2d) -> nn.Module:
    """Return a ``Conv2dSame`` of the geometry of ``layer``, without storage."""
    geometry = {name: getattr(layer, name) for name in layer.arguments if not name.startswith("padding")}
    static: nn.Module = Conv2dSame(**geometry, bias=layer.bias_bank is not None, device="meta", dtype=layer.bank.dtype)
    return static


class DynamicStdConv2d(DynamicConv2d):
    """For timm's ``StdConv2d``: every output channel of every kernel is standardised over its inputs and positions."""

    replaces = StdConv2d
    exact_starts = ("copies",)  # other kernels have other means and variances, which do not average out
    eps: float = 1e-6

    @classmethod
    def like(cls, static: nn.Module, *, k: int, reduction: int = 4, gate: str = "softmax") -> Self:
        layer = super().like(static, k=k, reduction=reduction, gate=gate)
        assert isinstance(static, StdConv2d | StdConv2dSame | ScaledStdConv2d | ScaledStdConv2dSame)
        layer.eps = static.eps
        return layer

    def gains(self) -> Tensor | None:
        """What a channel is scaled by after it was standardised, (Cout,); None is 1."""
        return None

    def kernels(self) -> Tensor:
        gains = self.gains()
        rows = self.bank.view(1, self.k * self.out_channels, -1)
        scale = None if gains is None else gains.repeat(self.k)
        standard = F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0, eps=self.eps)
        return standard.view(self.bank.shape)


class DynamicScaledStdConv2d(DynamicStdConv2d):
    """For timm's ``ScaledStdConv2d``: standardised, then scaled by a learned gain that the K kernels share."""

    replaces = ScaledStdConv2d
    kept = ("gain",)
    scale: float = 1.0
    gain: nn.Parameter

    @classmethod
    def like(cls, static: nn.Module, *, k: int, reduction: int = 4, gate: str = "softmax") -> Self:
        layer = super().like(static, k=k, reduction=reduction, gate=gate)
        assert isinstance(static, ScaledStdConv2d | ScaledStdConv2dSame)
        layer.scale = static.scale
        layer.gain = nn.Parameter(torch.empty_like(static.gain))
        return layer

    def gains(self) -> Tensor:
        return (self.gain * self.scale).view(-1)


class _PadSame(DynamicConv2d):
    """TensorFlow's padding where the static layer has it: ``padding='SAME'`` of timm can also mean a fixed one."""

    same_pad: bool = True

    @classmethod
    def like(cls, static: nn.Module, *, k: int, reduction: int = 4, gate: str = "softmax") -> Self:
        layer = super().like(static, k=k, reduction=reduction, gate=gate)
        assert isinstance(static, StdConv2dSame | ScaledStdConv2dSame)
        layer.same_pad = static.same_pad
        return layer

    def plain(self) -> nn.Module:
        return _same(self) if self.same_pad else super().plain()

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        if self.same_pad:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        return x, self.padding


class DynamicStdConv2dSame(_PadSame, DynamicStdConv2d):
    """For timm's ``StdConv2dSame``."""

    replaces = StdConv2dSame


class DynamicScaledStdConv2dSame(_PadSame, DynamicScaledStdConv2d):
    """For timm's ``ScaledStdConv2dSame``."""

    replaces = ScaledStdConv2dSame
