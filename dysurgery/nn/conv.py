"""Dynamic convolution: K parallel kernels, one attention, one convolution per sample with the mixed kernel.

In comes a feature map, out goes another, exactly as from the :class:`torch.nn.Conv2d` it stands for.
"""

from typing import Any, ClassVar, Self

from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from dysurgery.nn import execution
from dysurgery.nn.layer import DynamicLayer


class DynamicConv2d(DynamicLayer):
    """``y = conv(x, sum_k pi_k(x) W_k) + sum_k pi_k(x) b_k`` with ``pi = gate(mean over H, W of x)``.

    The first nine arguments are those of :class:`torch.nn.Conv2d`. Fresh kernels are drawn independently; use
    :meth:`from_static` to start from a trained convolution.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: (kh, kw).
        stride: (rows, columns).
        padding: integers, ``"valid"`` or ``"same"``.
        dilation: (rows, columns).
        groups: from 1 to Cin.
        bias: whether to add a bias.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        k: number of kernels K.
        reduction: hidden width of the attention is ``max(4, Cin // reduction)``.
        gate: ``softmax`` or ``sigmoid``.
        device: where the parameters live.
        dtype: their type.

    Raises:
        UsageError: for an option of the gate out of range.
        ValueError: for a geometry that :class:`torch.nn.Conv2d` refuses.

    Source: Chen et al., Dynamic Convolution: Attention over Convolution Kernels, CVPR 2020 (arXiv 1912.03458).
    """

    replaces: ClassVar[type[nn.Module]] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        k: int = 4,
        reduction: int = 4,
        gate: str = "softmax",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        # A static twin without storage checks the geometry and works out the padding of 'same'.
        twin = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        super().__init__(
            in_channels,
            tuple(twin.weight.shape),
            bias,
            k=k,
            reduction=reduction,
            gate=gate,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.padding_mode = padding_mode
        self._border = list(twin._reversed_padding_repeated_twice)

    @classmethod
    def like(cls, static: nn.Module, *, k: int, reduction: int = 4, gate: str = "softmax") -> Self:
        assert isinstance(static, nn.Conv2d)
        return cls(
            static.in_channels,
            static.out_channels,
            static.kernel_size,  # type: ignore[arg-type]
            static.stride,  # type: ignore[arg-type]
            static.padding,  # type: ignore[arg-type]
            static.dilation,  # type: ignore[arg-type]
            static.groups,
            static.bias is not None,
            static.padding_mode,
            k=k,
            reduction=reduction,
            gate=gate,
            device=static.weight.device,
            dtype=static.weight.dtype,
        )

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | str]:
        """Pad x by what the convolution itself cannot; return it with the zero padding that is left to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._border, mode=self.padding_mode), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, Cin, H, W), or one sample (Cin, H, W), to y (B, Cout, H', W') or (Cout, H', W')."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        pi = self.gate(x.mean(dim=(2, 3)))
        x, padding = self.pad(x)
        geometry = execution.Geometry(
            self.out_channels, self.kernel_size, self.stride, padding, self.dilation, self.groups
        )
        return execution.convolve(x, pi, self.bank, self.bias_bank, geometry)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, k={self.k}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}"
        )
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias_bank is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text


class DynamicConv2dSame(DynamicConv2d):
    """The same for timm's ``Conv2dSame``: TensorFlow's padding, which depends on the input's size."""

    replaces = Conv2dSame

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | str]:
        # timm pads first and then convolves with self.padding, which is (0, 0).
        return pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)), (0, 0)
