"""The ways to run one convolution per sample, each with its own mixed kernel, and the choice among them.

Every way takes ``(x, pi, bank, bias_bank, geometry)`` and computes, for sample b, ``W_b = sum_k pi_bk W_k``,
``bias_b = sum_k pi_bk bias_k`` and ``y_b = conv(x_b, W_b) + bias_b`` (Chen et al., CVPR 2020, section 3). A new way
is a function entered in :data:`WAYS`, and a line in :func:`choose`; the layers call :func:`convolve` and see no more.

Shapes: x (B, Cin, H, W), pi (B, K), bank (K, Cout * Cin/groups * kh * kw), bias_bank (K, Cout), y (B, Cout, H', W').
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Geometry(NamedTuple):
    """What :func:`torch.nn.functional.conv2d` needs to know beside its tensors; zero padding only."""

    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int


Way = Callable[[Tensor, Tensor, Tensor, Tensor | None, Geometry], Tensor]


def mix(pi: Tensor, bank: Tensor) -> Tensor:
    """Aggregate: weights pi (B, K) and bank (K, N) to one mixed row per sample (B, N)."""
    return pi.to(bank.dtype) @ bank


def single(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One ordinary convolution, for at most one sample."""
    # The sum is pi itself for one sample, and zeros of the right shape for an empty batch.
    pi = pi.sum(dim=0, keepdim=True)
    weight = mix(pi, bank).view(geometry.out_channels, -1, *geometry.kernel_size)
    bias = None if bias_bank is None else mix(pi, bias_bank).view(-1)
    _, _, stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def matmul(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One batched matrix product, for 1x1 kernels without padding; keeps NCHW and channels_last as they come."""
    row, column = geometry.stride
    if (row, column) != (1, 1):
        x = x[:, :, ::row, ::column]
    batch, channels, height, width = x.shape
    weight = mix(pi, bank).view(batch, geometry.out_channels, channels)
    bias = None if bias_bank is None else mix(pi, bias_bank)
    if x.stride(1) == 1:
        # channels_last: pixels are rows, so that nothing is copied.
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        y = _product(rows, weight.transpose(1, 2), None if bias is None else bias.unsqueeze(1))
        return y.view(batch, height, width, geometry.out_channels).permute(0, 3, 1, 2)
    y = _product(weight, x.reshape(batch, channels, height * width), None if bias is None else bias.unsqueeze(2))
    return y.view(batch, geometry.out_channels, height, width)


def grouped(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution with B * groups groups over all samples side by side: covers every geometry."""
    out_channels, kernel_size, stride, padding, dilation, groups = geometry
    batch, channels = x.shape[:2]
    weight = mix(pi, bank).view(batch * out_channels, channels // groups, *kernel_size)
    bias = None if bias_bank is None else mix(pi, bias_bank).view(-1)
    side_by_side = x.reshape(1, batch * channels, *x.shape[2:])
    y = F.conv2d(side_by_side, weight, bias, stride, padding, dilation, batch * groups)
    return y.view(batch, out_channels, *y.shape[2:])


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)


WAYS: dict[str, Way] = {"single": single, "matmul": matmul, "grouped": grouped}


def choose(x: Tensor, geometry: Geometry) -> str:
    """Return the name of the way for this input: from static facts only, so that it compiles without a graph break."""
    if x.shape[0] <= 1:
        return "single"
    unpadded = geometry.padding in ((0, 0), "valid", "same")  # 'same' pads a 1x1 kernel by nothing
    if geometry.kernel_size == (1, 1) and geometry.groups == 1 and unpadded:
        return "matmul"
    return "grouped"


def convolve(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """Run the convolution the way :func:`choose` says."""
    return WAYS[choose(x, geometry)](x, pi, bank, bias_bank, geometry)


def linear(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None) -> Tensor:
    """Map x (B, N, Cin) to (B, N, Cout) with one mixed matrix (Cout, Cin) per sample; bank (K, Cout * Cin)."""
    weight = mix(pi, bank).view(x.shape[0], bank.shape[1] // x.shape[2], x.shape[2])
    bias = None if bias_bank is None else mix(pi, bias_bank).unsqueeze(1)
    return _product(x, weight.transpose(1, 2), bias)
