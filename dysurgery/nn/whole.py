"""A whole layer that is trained, in compiled C: pooling, gate and convolution are one step for autograd.

Part by part, autograd would spread the gradient of the mean over a map of its own and add that to the convolution's:
two more passes over a map, and the gate is ten small operations in either direction. Here what the mean contributes is
added as the gradient of x is written. Kept for the backward pass are x, its mean and pi, and no mixed kernels.

Shapes as in :mod:`dysurgery.nn.execution`; z and h are the logits (B, K) and the hidden units of the gate.
"""

from typing import Any

import torch
from torch import Tensor

from dysurgery.nn import native
from dysurgery.nn.tiles import Tiling, grouped_convolution, room_for_output, wanted_gradients


def whole(
    x: Tensor, gate: tuple[Tensor, ...], bank: Tensor, bias_bank: Tensor | None, tiling: Tiling, *, sigmoid: bool
) -> Tensor:
    """Return y of a layer.

    Args:
        x: (B, Cin, H, W) in channels_last.
        gate: weight and bias of FC1, those of FC2, and tau, of which no gradient is known.
        bank: (K, N).
        bias_bank: (K, Cout) or None.
        tiling: for :data:`dysurgery.nn.tiles.NATIVE`.
        sigmoid: the gate's function, instead of softmax.
    """
    y: Tensor = _Whole.apply(x, *gate, bank, bias_bank, tiling, sigmoid)
    return y


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tau: Tensor, bank: Tensor,
        bias_bank: Tensor | None, tiling: Tiling, sigmoid: bool,
    ) -> Tensor:  # fmt: skip
        mean = native.pool(x)
        pi = native.gate(mean, (w1, b1, w2, b2, tau), sigmoid=sigmoid)
        y = room_for_output(x, tiling)
        native.forward(x, pi, bank, None if bias_bank is None else pi @ bias_bank, y, tiling)
        ctx.tiling, ctx.sigmoid = tiling, sigmoid
        ctx.save_for_backward(x, mean, pi, w1, b1, w2, b2, tau, bank, bias_bank)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, pi, w1, b1, w2, b2, tau, bank, bias_bank = ctx.saved_tensors
        tiling, wanted = ctx.tiling, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: the gradients will be differentiated again
            inputs = (x, w1, b1, w2, b2, tau, bank, bias_bank)
            return (*_differentiable(gy, inputs, tiling, ctx.sigmoid, wanted), None, None)
        gpi, gbank = native.kernel_gradients(gy, x, pi, bank, tiling, (any(wanted[:5]), wanted[6]))
        gbias_bank = None
        if bias_bank is not None and (gpi is not None or wanted[7]):
            gbias = gy.sum(dim=(2, 3))
            gbias_bank = pi.mT @ gbias if wanted[7] else None
            gpi = None if gpi is None else gpi.addmm_(gbias, bias_bank.mT)
        gate: tuple[Tensor | None, ...] = (None,) * 4
        first = None
        if gpi is not None:
            h = torch.addmm(b1, mean, w1.mT).relu_()
            gz = gpi * pi * (1 - pi) if ctx.sigmoid else (gpi - (gpi * pi).sum(dim=1, keepdim=True)) * pi
            gz = gz / tau
            gh = (gz @ w2) * (h > 0)
            gate = gh.mT @ mean, gh.sum(dim=0), gz.mT @ h, gz.sum(dim=0)
            first = (gh @ w1) / (x.shape[2] * x.shape[3])
        gx = None
        if wanted[0]:
            gx = torch.empty_like(x)
            native.input_gradient(gy, pi, bank, gx, tiling, first)
        return gx, *gate, None, gbank, gbias_bank, None, None


def _differentiable(
    gy: Tensor, inputs: tuple[Tensor | None, ...], tiling: Tiling, sigmoid: bool, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the same gradients by operations that autograd follows."""
    views: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, w1, b1, w2, b2, tau, bank, bias_bank = views
    z = torch.addmm(b2, torch.addmm(b1, x.mean(dim=(2, 3)), w1.mT).relu(), w2.mT) / tau
    pi = torch.sigmoid(z) if sigmoid else torch.softmax(z, dim=-1)
    return wanted_gradients(grouped_convolution(x, pi, bank, bias_bank, tiling), gy, views, wanted)
