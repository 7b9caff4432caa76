"""Convolutions for a GPU that mix their kernels as they go: the way ``fused`` of :mod:`dysurgery.nn.execution`.

An implicit GEMM, in Triton: each program convolves the positions of one sample with some output channels, and of the K
kernels it loads a tile, mixes it with pi_b in registers, and multiplies. So no mixed kernel is ever written to memory,
where B of them would be B times the weight, forward or backward. :mod:`dysurgery.nn.tiles` has this in its table
beside the loops for a CPU, and gives it the rest: autograd, autocast, torch.compile.

For dense kernels of two axes in float16, bfloat16, float32 (in TF32 where torch allows it to convolutions) and
float64, with strides of memory as they come. Products are added up in float32, or float64. Written and checked without
a GPU: Triton's interpreter runs them in the tests, and Triton's compiler builds them for one; nobody has timed them
yet, so that :func:`dysurgery.nn.execution.choose` does not take them and :func:`dysurgery.autotune` may.

Shapes and names as in :mod:`dysurgery.nn.tiles`; T is the number of taps of a kernel.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dysurgery.nn.tiles import Tiling


def forward(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, y: Tensor, tiling: Tiling) -> None:
    """Write the convolution of each sample of x with its own mix of the bank to y."""
    weight = (x.shape[1] * _taps(tiling), _taps(tiling))
    _launch(x, pi, bank, bias_bank, y, weight, tiling, gradient=False)


def input_gradient(gy: Tensor, pi: Tensor, bank: Tensor, gx: Tensor, tiling: Tiling) -> None:
    """Write the gradient in x: the same product, with the kernels' two channel axes exchanged."""
    weight = (_taps(tiling), gx.shape[1] * _taps(tiling))
    _launch(gy, pi, bank, None, gx, weight, tiling, gradient=True)


def kernel_gradients(gy: Tensor, x: Tensor, pi: Tensor, bank: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Return what the kernels contribute to the gradients in pi and in the bank.

    Each program finds a tile of each sample's gradient dW_b, and adds pi_bk dW_b to that of kernel k and
    <dW_b, W_k> to that of pi_bk. What different programs find is added up in a fixed order, so that a run can be
    repeated.
    """
    (batch, channels), (out_channels, k), taps = x.shape[:2], (gy.shape[1], bank.shape[0]), _taps(tiling)
    block = Block.of(gy.shape[2] * gy.shape[3], out_channels, channels, most=32)
    tiles = triton.cdiv(out_channels, block.out_channels) * triton.cdiv(channels, block.channels) * taps
    splits = min(batch, triton.cdiv(_PROGRAMS, tiles))
    accumulator = _accumulator(x)
    gpi = torch.empty(tiles, batch, k, dtype=accumulator, device=x.device)
    gbank = torch.empty(splits, *bank.shape, dtype=accumulator, device=x.device)
    with torch.cuda.device_of(x):
        _kernel_gradients[(tiles, splits)](
            x, gy, pi.contiguous(), bank.contiguous(), gpi, gbank,
            batch, channels, out_channels, *x.shape[2:], *gy.shape[2:], *x.stride(), *gy.stride(),
            *tiling.stride, *tiling.padding, *tiling.dilation,
            KERNELS=k, PADDED=triton.next_power_of_2(k), num_warps=WARPS[_kernel_gradients],
            **_constants(x, block, tiling),
        )  # fmt: skip
    return gpi.sum(dim=0).to(pi.dtype), gbank.sum(dim=0).to(bank.dtype)


class Block(NamedTuple):
    """The sizes of what one program multiplies: powers of two, 16 or more."""

    positions: int
    out_channels: int
    channels: int

    @classmethod
    def of(cls, positions: int, out_channels: int, channels: int, most: int = 64) -> "Block":
        """Return one no larger than the problem, nor than 64 positions, ``most`` output and 32 input channels."""
        sizes = zip((positions, out_channels, channels), (64, most, 32), strict=True)
        return cls(*(max(16, min(limit, triton.next_power_of_2(size))) for size, limit in sizes))


_PROGRAMS = 512
"""At least so many share the gradients of a bank: a few for each multiprocessor of a large GPU."""


def _launch(
    x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, y: Tensor,
    weight: tuple[int, int], tiling: Tiling, *, gradient: bool,
) -> None:  # fmt: skip
    """Write to y; ``weight`` are the steps in a kernel from one channel of y, and of x, to the next."""
    block = Block.of(y.shape[2] * y.shape[3], y.shape[1], x.shape[1])
    positions = triton.cdiv(y.shape[2] * y.shape[3], block.positions)
    grid = (x.shape[0] * positions, triton.cdiv(y.shape[1], block.out_channels))
    pi, bank = pi.contiguous(), bank.contiguous()
    with torch.cuda.device_of(x):
        _convolve[grid](
            x, pi, bank, pi if bias_bank is None else bias_bank.contiguous(), y,
            x.shape[1], y.shape[1], *x.shape[2:], *y.shape[2:], *x.stride(), *y.stride(), *weight, bank.shape[1],
            *tiling.stride, *tiling.padding, *tiling.dilation,
            KERNELS=bank.shape[0], BIAS=bias_bank is not None, GRADIENT=gradient, num_warps=WARPS[_convolve],
            **_constants(x, block, tiling),
        )  # fmt: skip


def _constants(x: Tensor, block: Block, tiling: Tiling) -> dict[str, Any]:
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return {
        "TAPS_H": tiling.weight_shape[2],
        "TAPS_W": tiling.weight_shape[3],
        "P": block.positions,
        "N": block.out_channels,
        "C": block.channels,
        "ACCUMULATOR": tl.float64 if _accumulator(x) == torch.float64 else tl.float32,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _taps(tiling: Tiling) -> int:
    return math.prod(tiling.weight_shape[2:])


@triton.jit
def _convolve(
    x, pi, bank, bias_bank, y,
    channels, out_channels, height, width, out_height, out_width,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, weight_n, weight_c, kernel,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KERNELS: tl.constexpr, BIAS: tl.constexpr, GRADIENT: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(out_height * out_width, P)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * P + tl.arange(0, P)
    n = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((P, N), ACCUMULATOR)
    # The taps innermost, as they are so in a kernel: what one of them loads, the next finds in the cache.
    for step in range(tl.cdiv(channels, C) * TAPS_H * TAPS_W):
        c = step // (TAPS_H * TAPS_W) * C + tl.arange(0, C)
        tap = step % (TAPS_H * TAPS_W)
        if GRADIENT:
            h = p // out_width + padding_h - tap // TAPS_W * dilation_h
            w = p % out_width + padding_w - tap % TAPS_W * dilation_w
            inside = (h >= 0) & (w >= 0) & (h % stride_h == 0) & (w % stride_w == 0)
            h, w = h // stride_h, w // stride_w
        else:
            h = p // out_width * stride_h - padding_h + tap // TAPS_W * dilation_h
            w = p % out_width * stride_w - padding_w + tap % TAPS_W * dilation_w
            inside = (h >= 0) & (w >= 0)
        inside = inside & (h < height) & (w < width) & (p < out_height * out_width)
        patch = tl.load(
            x + b * x_b + (h * x_h + w * x_w)[:, None] + (c * x_c)[None, :],
            mask=inside[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        at = (c * weight_c)[:, None] + (n * weight_n)[None, :] + tap
        exists = (c < channels)[:, None] & (n < out_channels)[None, :]
        mixed = tl.zeros((C, N), ACCUMULATOR)
        for k in tl.static_range(KERNELS):
            tile = tl.load(bank + k * kernel + at, mask=exists, other=0.0)
            mixed += tl.load(pi + b * KERNELS + k).to(ACCUMULATOR) * tile.to(ACCUMULATOR)
        total += tl.dot(patch, mixed.to(patch.dtype), input_precision=PRECISION, out_dtype=ACCUMULATOR)
    if BIAS:
        for k in tl.static_range(KERNELS):
            bias = tl.load(bias_bank + k * out_channels + n, mask=n < out_channels, other=0.0)
            total += (tl.load(pi + b * KERNELS + k).to(ACCUMULATOR) * bias.to(ACCUMULATOR))[None, :]
    tl.store(
        y + b * y_b + (p // out_width * y_h + p % out_width * y_w)[:, None] + (n * y_c)[None, :],
        total.to(y.dtype.element_ty),
        mask=(p < out_height * out_width)[:, None] & (n < out_channels)[None, :],
    )


@triton.jit
def _kernel_gradients(
    x, gy, pi, bank, gpi, gbank,
    batch, channels, out_channels, height, width, out_height, out_width,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KERNELS: tl.constexpr, PADDED: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, C: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, splits = tl.program_id(0), tl.num_programs(1)
    tap = tile % (TAPS_H * TAPS_W)
    c = tile // (TAPS_H * TAPS_W) % tl.cdiv(channels, C) * C + tl.arange(0, C)
    n = tile // (TAPS_H * TAPS_W) // tl.cdiv(channels, C) * N + tl.arange(0, N)
    k = tl.arange(0, PADDED)
    kernel = out_channels * channels * TAPS_H * TAPS_W
    at = ((n * channels)[:, None] + c[None, :]) * TAPS_H * TAPS_W + tap
    at = (k * kernel)[:, None, None] + at[None, :, :]
    exists = (n < out_channels)[:, None] & (c < channels)[None, :]
    exists = (k < KERNELS)[:, None, None] & exists[None, :, :]
    total = tl.zeros((PADDED, N, C), ACCUMULATOR)
    share = tl.cdiv(batch, splits)
    first = tl.program_id(1).to(tl.int64) * share
    for step in range(tl.minimum(share, batch - first)):
        b = first + step
        found = tl.zeros((N, C), ACCUMULATOR)
        for start in range(0, out_height * out_width, P):
            p = start + tl.arange(0, P)
            h = p // out_width * stride_h - padding_h + tap // TAPS_W * dilation_h
            w = p % out_width * stride_w - padding_w + tap % TAPS_W * dilation_w
            inside = (h >= 0) & (w >= 0) & (h < height) & (w < width) & (p < out_height * out_width)
            gradient = tl.load(
                gy + b * y_b + (n * y_c)[:, None] + (p // out_width * y_h + p % out_width * y_w)[None, :],
                mask=(n < out_channels)[:, None] & (p < out_height * out_width)[None, :],
                other=0.0,
            )
            patch = tl.load(
                x + b * x_b + (h * x_h + w * x_w)[:, None] + (c * x_c)[None, :],
                mask=inside[:, None] & (c < channels)[None, :],
                other=0.0,
            )
            found += tl.dot(gradient, patch, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        weight = tl.load(pi + b * KERNELS + k, mask=k < KERNELS, other=0.0).to(ACCUMULATOR)
        total += weight[:, None, None] * found[None, :, :]
        kernels = tl.load(bank + at, mask=exists, other=0.0).to(ACCUMULATOR)
        dots = tl.sum(tl.sum(kernels * found[None, :, :], axis=2), axis=1)
        tl.store(gpi + (tile.to(tl.int64) * batch + b) * KERNELS + k, dots, mask=k < KERNELS)
    tl.store(gbank + tl.program_id(1).to(tl.int64) * KERNELS * kernel + at, total, mask=exists)


WARPS = {_convolve: 4, _kernel_gradients: 8}
"""So many that the accumulators stay in registers (built for a Hopper GPU, bfloat16, K = 4)."""
