"""The ways to run one convolution per sample, each with its own mixed kernel, and the choice among them.

Every way takes ``(x, pi, bank, bias_bank, geometry)`` and computes, for sample b, ``W_b = sum_k pi_bk W_k``,
``bias_b = sum_k pi_bk bias_k`` and ``y_b = conv(x_b, W_b) + bias_b`` (Chen et al., CVPR 2020, section 3). A new way
is a function entered in :data:`WAYS`, and a line in a chooser; the layers call :func:`convolve` and see no more.
:func:`choose` is the chooser of every layer; :mod:`dysurgery.export` sets another one in the copy that it writes.

Shapes: x (B, Cin, *size) with one to three axes of size, pi (B, K), bank (K, weights of one kernel), bias_bank
(K, Cout), y (B, Cout, *size').
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import scan
from torch.nn import functional as F


class Geometry(NamedTuple):
    """What torch's convolutions need to know beside their tensors; zero padding only, one entry for each axis."""

    weight_shape: tuple[int, ...]
    """(Cout, Cin/groups, *kernel_size), or (Cin, Cout/groups, *kernel_size) if transposed."""
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def out_channels(self) -> int:
        """Cout."""
        return self.weight_shape[1] * self.groups if self.transposed else self.weight_shape[0]


Way = Callable[[Tensor, Tensor, Tensor, Tensor | None, Geometry], Tensor]
Chooser = Callable[[Tensor, Geometry], str]


def mix(pi: Tensor, bank: Tensor) -> Tensor:
    """Aggregate: weights pi (B, K) and bank (K, N) to one mixed row per sample (B, N)."""
    return pi.to(bank.dtype) @ bank


def single(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One ordinary convolution, for at most one sample."""
    # The sum is pi itself for one sample, and zeros of the right shape for an empty batch.
    pi = pi.sum(dim=0, keepdim=True)
    weight = mix(pi, bank).view(geometry.weight_shape)
    bias = None if bias_bank is None else mix(pi, bias_bank).view(-1)
    return _convolution(x, weight, bias, geometry, geometry.groups)


def matmul(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One batched matrix product, for 1x1 kernels without padding; keeps NCHW and channels_last as they come."""
    if any(step != 1 for step in geometry.stride):
        x = x[(slice(None), slice(None), *(slice(None, None, step) for step in geometry.stride))]
    batch, channels, *size = x.shape
    positions = math.prod(size)  # Size.numel() would be a constant in an exported graph
    weight = mix(pi, bank).view(batch, geometry.out_channels, channels)
    bias = None if bias_bank is None else mix(pi, bias_bank)
    if x.stride(1) == 1:
        # channels_last: pixels are rows, so that nothing is copied.
        rows = x.movedim(1, -1).reshape(batch, positions, channels)
        y = _product(rows, weight.transpose(1, 2), None if bias is None else bias.unsqueeze(1))
        return y.view(batch, *size, geometry.out_channels).movedim(-1, 1)
    y = _product(weight, x.reshape(batch, channels, positions), None if bias is None else bias.unsqueeze(2))
    return y.view(batch, geometry.out_channels, *size)


def grouped(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution with B * groups groups over all samples side by side: covers every geometry."""
    batch, channels = x.shape[:2]
    rows, *kernel = geometry.weight_shape
    weight = mix(pi, bank).view(batch * rows, *kernel)
    bias = None if bias_bank is None else mix(pi, bias_bank).view(-1)
    y = _convolution(x.reshape(1, batch * channels, *x.shape[2:]), weight, bias, geometry, batch * geometry.groups)
    return y.view(batch, geometry.out_channels, *y.shape[2:])


def one_by_one(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One ordinary convolution after another, as a loop inside the graph: covers every geometry, for ONNX.

    There the number of groups is a constant, which :func:`grouped` would tie to one batch size.
    """
    weight = mix(pi, bank).view(x.shape[0], *geometry.weight_shape)
    rows = (x, weight) if bias_bank is None else (x, weight, mix(pi, bias_bank))

    def step(carried: Tensor, row: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        sample, kernel, *bias = row
        y = _convolution(sample.unsqueeze(0), kernel, bias[0] if bias else None, geometry, geometry.groups)
        return carried.clone(), y.squeeze(0)

    # A scan has to carry something from step to step.
    y: Tensor = scan(step, x.new_zeros(()), rows)[1]
    return y


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int) -> Tensor:
    """Run torch's own convolution of this geometry, with another number of groups."""
    _, stride, padding, dilation, _, transposed, output_padding = geometry
    convolutions: Any = _TRANSPOSED if transposed else _CONVOLUTIONS
    order = (output_padding, groups, dilation) if transposed else (dilation, groups)
    y: Tensor = convolutions[x.dim() - 3](x, weight, bias, stride, padding, *order)
    return y


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)


WAYS: dict[str, Way] = {"single": single, "matmul": matmul, "grouped": grouped, "one by one": one_by_one}


def choose(x: Tensor, geometry: Geometry) -> str:
    """Return the name of the way for this input: from static facts only, so that it compiles without a graph break."""
    return "single" if x.shape[0] <= 1 else choose_for_any_batch(x, geometry)


def choose_for_any_batch(x: Tensor, geometry: Geometry) -> str:
    """The same for a graph that is to run on any number of samples: never look at how many there are."""
    return "matmul" if _is_matmul(geometry) else "grouped"


def choose_for_onnx(x: Tensor, geometry: Geometry) -> str:
    """The same where, beyond that, the number of groups is a constant."""
    return "matmul" if _is_matmul(geometry) else "one by one"


def _is_matmul(geometry: Geometry) -> bool:
    unpadded = geometry.padding in ("valid", "same") or not any(geometry.padding)  # 'same' pads a 1x1 by nothing
    pointwise = all(size == 1 for size in geometry.weight_shape[2:])
    return pointwise and geometry.groups == 1 and unpadded and not geometry.transposed


def convolve(
    x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry, chooser: Chooser = choose
) -> Tensor:
    """Run the convolution the way that ``chooser`` says."""
    return WAYS[chooser(x, geometry)](x, pi, bank, bias_bank, geometry)


def linear(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None) -> Tensor:
    """Map x (B, N, Cin) to (B, N, Cout) with one mixed matrix (Cout, Cin) per sample; bank (K, Cout * Cin)."""
    weight = mix(pi, bank).view(x.shape[0], bank.shape[1] // x.shape[2], x.shape[2])
    bias = None if bias_bank is None else mix(pi, bias_bank).unsqueeze(1)
    return _product(x, weight.transpose(1, 2), bias)
