"""The paper's dynamic perceptron: K parallel matrices, one attention, one matrix product per sample."""

import math
from typing import Any, Self

from torch import Tensor, nn

from dysurgery.nn import execution
from dysurgery.nn.layer import DynamicLayer


class DynamicLinear(DynamicLayer):
    """``y = (sum_k pi_k(x) W_k) x + sum_k pi_k(x) b_k``, on the same bank, gate and temperature as the convolution.

    Args:
        in_features: Cin.
        out_features: Cout.
        bias: whether to add a bias.
        k: number of matrices K.
        reduction: hidden width of the attention is ``max(4, Cin // reduction)``.
        gate: ``softmax`` or ``sigmoid``.
        device: where the parameters live.
        dtype: their type.

    Raises:
        UsageError: for an option of the gate out of range.

    Source: Chen et al., CVPR 2020, section 3 (dynamic perceptron).
    """

    replaces = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k: int = 4,
        reduction: int = 4,
        gate: str = "softmax",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        shape = (out_features, in_features)
        super().__init__(
            in_features,
            shape,
            bias,
            out_channels=out_features,
            k=k,
            reduction=reduction,
            gate=gate,
            device=device,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def like(cls, static: nn.Module, *, k: int, reduction: int = 4, gate: str = "softmax") -> Self:
        assert isinstance(static, nn.Linear)
        return cls(
            static.in_features,
            static.out_features,
            static.bias is not None,
            k=k,
            reduction=reduction,
            gate=gate,
            device=static.weight.device,
            dtype=static.weight.dtype,
        )

    def plain(self) -> nn.Module:
        bias = self.bias_bank is not None
        return nn.Linear(self.in_features, self.out_features, bias, device="meta", dtype=self.bank.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, ..., Cin) to (B, ..., Cout); the attention sees the mean over the axes in between.

        One vector (Cin,) is one sample.
        """
        if x.dim() == 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        pi = self.gate(rows.mean(dim=1))
        y = execution.linear(rows, pi, self.kernels(), self.bias_bank)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = self.bias_bank is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, bias={bias}"
