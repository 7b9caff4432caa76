"""Dynamic convolution: K parallel kernels, one attention, one convolution per sample with the mixed kernel.

In comes a feature map, out goes another, exactly as from the torch convolution it stands for: :class:`torch.nn.Conv2d`
in the paper; the same arithmetic serves one axis (audio), three (video) and transposed convolutions.
"""

from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dysurgery.nn import execution
from dysurgery.nn.epilogue import Epilogue
from dysurgery.nn.layer import DynamicLayer

Size = int | tuple[int, ...]


class DynamicConvNd(DynamicLayer):
    """What dynamic convolutions of any number of axes share: geometry, pooling, the way through :mod:`execution`.

    ``y = conv(x, sum_k pi_k(x) W_k) + sum_k pi_k(x) b_k`` with ``pi = gate(mean of x over its axes)``.
    """

    geometry_of: ClassVar[type[_ConvNd]]
    """The torch class that checks this layer's geometry and takes the same arguments."""

    arguments: ClassVar[tuple[str, ...]] = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip
    """The arguments of :attr:`geometry_of` that are attributes of it as well."""

    chooser: execution.Chooser = staticmethod(execution.choose)
    """Which of :data:`execution.WAYS` to go; an instance that is to be exported has another one."""

    epilogue: Epilogue | None = None
    """What this layer does to its output beside, in one call of compiled C; see :func:`dysurgery.fuse_bn`."""

    source: Epilogue | None = None
    """That of the layer whose output, activated, is the input of this one, and which may know its mean."""

    def __init__(self, twin: _ConvNd, *, k: int, reduction: int, gate: str, device: Any, dtype: Any) -> None:
        # The static twin has no storage. It checked the geometry and worked out the padding of 'same'.
        super().__init__(
            twin.in_channels,
            tuple(twin.weight.shape),
            twin.bias is not None,
            out_channels=twin.out_channels,
            k=k,
            reduction=reduction,
            gate=gate,
            device=device,
            dtype=dtype,
        )
        self.in_channels = twin.in_channels
        self.kernel_size = twin.kernel_size
        self.stride = twin.stride
        self.padding = twin.padding
        self.dilation = twin.dilation
        self.groups = twin.groups
        self.padding_mode = twin.padding_mode
        self.transposed = twin.transposed
        self.output_padding = twin.output_padding
        self._border = list(twin._reversed_padding_repeated_twice)

    @classmethod
    def like(cls, static: nn.Module, *, k: int, reduction: int = 4, gate: str = "softmax") -> Self:
        assert isinstance(static, cls.geometry_of)
        make: Any = cls  # each subclass takes the arguments of its torch class
        layer: Self = make(
            **{name: getattr(static, name) for name in cls.arguments},
            bias=static.bias is not None,
            k=k,
            reduction=reduction,
            gate=gate,
            device=static.weight.device,
            dtype=static.weight.dtype,
        )
        return layer

    def plain(self) -> nn.Module:
        make: Any = self.geometry_of
        geometry = {name: getattr(self, name) for name in self.arguments}
        static: nn.Module = make(**geometry, bias=self.bias_bank is not None, device="meta", dtype=self.bank.dtype)
        return static

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """Pad x by what the convolution itself cannot; return it with the zero padding that is left to do."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._border, mode=self.padding_mode), (0,) * len(self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, Cin, *size), or one sample (Cin, *size), to y (B, Cout, *size') or (Cout, *size')."""
        if x.dim() == len(self.stride) + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return self._run(x, self.output_padding)

    def _run(self, x: Tensor, output_padding: tuple[int, ...]) -> Tensor:
        padded, padding = self.pad(x)
        geometry = execution.Geometry(
            self.weight_shape, self.stride, padding, self.dilation, self.groups, self.transposed, output_padding
        )
        kernels, bias_bank = self.kernels(), self._own("bias_bank")
        gate: Any = self._modules["gate"]
        if padded is x:
            epilogue = None if self._forward_hooks else self.epilogue  # a hook sees the output as it is
            source = None if self._forward_pre_hooks else self.source  # it may have changed x
            y = execution.in_one_call(x, gate, kernels, bias_bank, geometry, self.chooser, epilogue, source)
            if y is not None:
                return y
        pi = gate(execution.pool(x))
        return execution.convolve(padded, pi, kernels, bias_bank, geometry, self.chooser)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, k={self.k}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}"
        )
        if any(self.output_padding):
            text += f", output_padding={self.output_padding}"
        if set(self.dilation) != {1}:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias_bank is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text


class _Forward(DynamicConvNd):
    """The constructor of the convolutions that are not transposed."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
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
        make: Any = self.geometry_of
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(
            make(*geometry, device="meta"), k=k, reduction=reduction, gate=gate, device=device, dtype=dtype
        )


class DynamicConv2d(_Forward):
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

    replaces = geometry_of = nn.Conv2d


class DynamicConv1d(_Forward):
    """The same over one axis: x (B, Cin, L); arguments as of :class:`torch.nn.Conv1d` and :class:`DynamicConv2d`."""

    replaces = geometry_of = nn.Conv1d


class DynamicConv3d(_Forward):
    """The same over three axes: x (B, Cin, D, H, W); arguments as of :class:`torch.nn.Conv3d`."""

    replaces = geometry_of = nn.Conv3d


class _Transposed(DynamicConvNd):
    """The constructor of the transposed convolutions, and their call with an output size."""

    arguments = (*DynamicConvNd.arguments, "output_padding")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        k: int = 4,
        reduction: int = 4,
        gate: str = "softmax",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        make: Any = self.geometry_of
        twin = make(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device="meta",
        )
        super().__init__(twin, k=k, reduction=reduction, gate=gate, device=device, dtype=dtype)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map x (B, Cin, *size), or one sample, to y; ``output_size`` as torch's transposed convolutions take it."""
        if x.dim() == len(self.stride) + 1:
            return self.forward(x.unsqueeze(0), output_size).squeeze(0)
        axes = len(self.stride)
        extra = _ConvTransposeNd._output_padding(
            self,  # type: ignore[arg-type]
            x,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            axes,
            self.dilation,  # type: ignore[arg-type]
        )
        return self._run(x, tuple(extra))


class DynamicConvTranspose2d(_Transposed):
    """A transposed convolution with K kernels; arguments as of :class:`torch.nn.ConvTranspose2d`."""

    replaces = geometry_of = nn.ConvTranspose2d


class DynamicConvTranspose1d(_Transposed):
    """The same over one axis; arguments as of :class:`torch.nn.ConvTranspose1d`."""

    replaces = geometry_of = nn.ConvTranspose1d


class DynamicConvTranspose3d(_Transposed):
    """The same over three axes; arguments as of :class:`torch.nn.ConvTranspose3d`."""

    replaces = geometry_of = nn.ConvTranspose3d
