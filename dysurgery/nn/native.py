"""Per-sample convolutions in C, for a CPU and maps in channels_last: dense and depthwise, forward and backward.

What :mod:`dysurgery.nn.tiles` does with torch's operations is done here in one call, ``_native.c``. A dense kernel is
mixed for 8 samples from one pass over the bank, into panels in the order in which they are multiplied, which stay in
the cache (the packing that BLIS and oneDNN do to a weight, with the mixing in it). On maps that are large enough, 3x3
kernels of stride 1 go through Winograd's F(2x2, 3x3), whose rounding is 1.4 times that of a plain convolution. A
depthwise kernel is mixed and slides over the rows of x where they are; taps beyond the border are left out. The
gradient of a mixed kernel goes to pi and to the bank from the cache too.

The module is compiled when the package is installed, if there is a C compiler; without it, :func:`available` is false
and the other ways are taken. It has AVX-512, AVX2 and plain vectors, and takes the best that the machine knows.

Without a backward pass (with one: :mod:`dysurgery.nn.whole`) a whole layer is one call: pooling, gate, mixed bias and
convolution, and the activation and the mean of the output, if somebody waits for them (:mod:`dysurgery.nn.epilogue`).
Where it goes another way or somebody listens to the gate, its attention is two calls instead of ten operations.

Shapes as in :mod:`dysurgery.nn.execution`; all tensors are float32.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dysurgery.nn.rows import eager

if TYPE_CHECKING:
    from dysurgery.nn.tiles import Tiling

try:
    import dysurgery.nn._native as _native  # after torch, whose threads it uses
except ImportError:
    _native = None  # type: ignore[assignment]


def available() -> bool:
    """Whether the module was compiled."""
    return _native is not None


def computes(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the attention on x may be computed here: it runs now, in float32 on a CPU, and is not differentiated."""
    if _native is None or type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu or not x.numel():
        return False
    # The last: whether somebody counts or records operations.
    if not eager() or torch._C._is_any_autocast_enabled() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return False
    return are_flat(parameters)


def are_flat(tensors: tuple[Tensor, ...]) -> bool:
    """Whether these may be given to C by their addresses, row by row."""
    return all([t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors])


def pool(x: Tensor) -> Tensor:
    """Return the mean over the positions of x (B, C, H, W) in channels_last, as (B, C)."""
    batch, channels, height, width = x.shape
    mean = x.new_empty(batch, channels)
    _native.pool(mean.data_ptr(), x.data_ptr(), batch, height, width, channels, torch.get_num_threads())
    return mean


def gate(descriptor: Tensor, parameters: tuple[Tensor, ...], *, sigmoid: bool) -> Tensor:
    """Return pi (B, K) of the pooled input (B, C): FC1, ReLU, FC2, then softmax or sigmoid at temperature tau.

    Args:
        descriptor: (B, C).
        parameters: weight and bias of FC1, those of FC2, and tau.
        sigmoid: instead of softmax.
    """
    descriptor, (k, hidden) = descriptor.contiguous(), parameters[2].shape
    batch, channels = descriptor.shape
    if [t.numel() for t in parameters] != [hidden * channels, hidden, k * hidden, k, 1]:
        raise RuntimeError(f"the gate's parameters do not fit together for {channels} channels")
    addresses = tuple([t.data_ptr() for t in parameters])
    pi = descriptor.new_empty(batch, k)
    _native.gate(pi.data_ptr(), descriptor.data_ptr(), addresses, batch, channels, hidden, k, sigmoid)
    return pi


def layer(
    x: Tensor, parameters: tuple[Tensor, ...], bank: Tensor, bias_bank: Tensor | None, y: Tensor,
    numbers: tuple[int, ...], *, sigmoid: bool, known: Tensor | None = None, activation: int = 0,
    mean: Tensor | None = None,
) -> bool:  # fmt: skip
    """Write y of a whole layer: pooling, :func:`gate`, convolution and activation. x and y are in channels_last.

    Returns whether parameters and banks are such that it could: float32, on a CPU, row by row, of the right sizes.

    Args:
        x: (B, Cin, H, W).
        parameters: of the gate.
        bank: (K, N).
        bias_bank: (K, Cout) or None.
        y: (B, Cout, H', W').
        numbers: see :func:`numbers`.
        sigmoid: the gate's function, instead of softmax.
        known: the mean of x over its positions (B, Cin), if somebody has it.
        activation: what y goes through, a number of :data:`dysurgery.nn.epilogue.ACTIVATIONS`, or 0.
        mean: written too, if given: the mean of y over its positions (B, Cout).
    """
    return _native.layer(
        y.data_ptr(), x.data_ptr(), 0 if known is None else known.data_ptr(), parameters, bank, bias_bank, numbers,
        activation, 0 if mean is None else mean.data_ptr(), sigmoid, torch.get_num_threads(),
    )  # fmt: skip


# As a node of a compiled graph. Calls of torch.library.custom_op, which checks more, take twice as long.
_torch: Any = torch.library  # whose functions are not all typed
_library = _torch.Library("dysurgery", "FRAGMENT")
_library.define(
    "layer(Tensor x, Tensor[] parameters, Tensor bank, Tensor? bias_bank, bool sigmoid, int out_channels, int[] window,"
    " Tensor? known, int activation, bool averages) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def layer_node(
    x: Tensor, parameters: list[Tensor], bank: Tensor, bias_bank: Tensor | None, sigmoid: bool, out_channels: int,
    window: list[int], known: Tensor | None, activation: int, averages: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y of :func:`layer` and its mean, as a node of a compiled graph.

    Args:
        x: (B, Cin, H, W).
        parameters: of the gate.
        bank: (K, N).
        bias_bank: (K, Cout) or None.
        sigmoid: the gate's function, instead of softmax.
        out_channels: Cout.
        window: kernel size, stride, padding and dilation, two each, and groups.
        known: the mean of x, or None.
        activation: see :func:`layer`.
        averages: whether the mean is wanted; it is empty otherwise.
    """
    y, mean = torch.ops.dysurgery.layer(
        x, parameters, bank, bias_bank, sigmoid, out_channels, window, known, activation, averages
    )
    return y, mean


def _node_output(x: Tensor, out_channels: int, window: list[int], averages: bool) -> tuple[Tensor, Tensor]:
    kh, kw, sh, sw, ph, pw, dh, dw, _ = window
    batch, _, height, width = x.shape
    rows, columns = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    strides = (rows * columns * out_channels, 1, columns * out_channels, out_channels)
    mean = x.new_empty((batch, out_channels) if averages else (0,))
    return x.new_empty_strided((batch, out_channels, rows, columns), strides), mean


def _run_node(
    x: Tensor, parameters: list[Tensor], bank: Tensor, bias_bank: Tensor | None, sigmoid: bool, out_channels: int,
    window: list[int], known: Tensor | None, activation: int, averages: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (y, mean), x = _node_output(x, out_channels, window, averages), _last(x)
    if y.numel():
        (batch, channels, *size), k = x.shape, bank.shape[0]
        conv = (batch, k, *size, channels, *y.shape[2:], out_channels, *window)
        done = layer(
            x, tuple(parameters), bank, bias_bank, y, conv, sigmoid=sigmoid, activation=activation,
            known=None if known is None else known.contiguous(), mean=mean if averages else None,
        )  # fmt: skip
        if not done:
            raise ValueError("parameters and banks must be float32 on a CPU, contiguous and of the sizes of the layer")
    return y, mean


def _fake_node(
    x: Tensor, parameters: list[Tensor], bank: Tensor, bias_bank: Tensor | None, sigmoid: bool, out_channels: int,
    window: list[int], known: Tensor | None, activation: int, averages: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _node_output(x, out_channels, window, averages)


_torch.impl(_library, "layer", "CPU")(_run_node)
_torch.register_fake("dysurgery::layer", _fake_node, lib=_library)


def forward(x: Tensor, pi: Tensor, bank: Tensor, bias: Tensor | None, y: Tensor, tiling: "Tiling") -> None:
    """Write y; bias (B, Cout) is mixed already.

    Raises:
        RuntimeError: if pi, the bank or the bias are not of the sizes that x, y and the geometry ask for.
    """
    if not y.numel():
        return
    (batch, outputs), (samples, k), weights = y.shape[:2], pi.shape, math.prod(tiling.weight_shape)
    if samples != batch or bank.shape != (k, weights) or (bias is not None and bias.shape != (batch, outputs)):
        raise RuntimeError(f"{k} kernels of {weights} weights, {outputs} outputs: bank or biases are of other sizes")
    x, pi, bank = _last(x), _flat(pi), _flat(bank)
    bias = None if bias is None else _flat(bias)
    out = _last(y)
    _native.forward(
        out.data_ptr(), x.data_ptr(), pi.data_ptr(), bank.data_ptr(), 0 if bias is None else bias.data_ptr(),
        numbers(x.shape, y.shape, pi.shape[1], tiling), torch.get_num_threads(),
    )  # fmt: skip
    if out is not y:
        y.copy_(out)


def input_gradient(
    gy: Tensor, pi: Tensor, bank: Tensor, gx: Tensor, tiling: "Tiling", first: Tensor | None = None
) -> None:
    """Write gx; ``first`` (B, Cin) is added at each position."""
    gy, pi, bank = _last(gy), _flat(pi), _flat(bank)
    first = None if first is None else _flat(first)
    out = _last(gx)
    _native.input_gradient(
        out.data_ptr(), gy.data_ptr(), pi.data_ptr(), bank.data_ptr(), 0 if first is None else first.data_ptr(),
        numbers(gx.shape, gy.shape, pi.shape[1], tiling), torch.get_num_threads(),
    )  # fmt: skip
    if out is not gx:
        gx.copy_(out)


def kernel_gradients(
    gy: Tensor, x: Tensor, pi: Tensor, bank: Tensor, tiling: "Tiling", wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return those of the gradients of pi (B, K) and of the bank that are wanted."""
    gy, x, pi, bank = _last(gy), _last(x), _flat(pi), _flat(bank)
    gpi, gbank = (torch.empty_like(t) if want else None for t, want in zip((pi, bank), wanted, strict=True))
    _native.weight_gradients(
        0 if gpi is None else gpi.data_ptr(), 0 if gbank is None else gbank.data_ptr(),
        gy.data_ptr(), x.data_ptr(), pi.data_ptr(), bank.data_ptr(),
        numbers(x.shape, gy.shape, pi.shape[1], tiling), torch.get_num_threads(),
    )  # fmt: skip
    return gpi, gbank


def _last(x: Tensor) -> Tensor:
    """Return x with its channels innermost in memory."""
    return _checked(x).contiguous(memory_format=torch.channels_last)


def _flat(x: Tensor) -> Tensor:
    """Return x row by row."""
    return _checked(x).contiguous()


def _checked(x: Tensor) -> Tensor:
    """Return what may be given to C by its address."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise TypeError(f"compiled C takes float32 on a CPU, not {x.dtype} on {x.device.type}")
    return x


def numbers(x: torch.Size, y: torch.Size, k: int, tiling: "Tiling") -> tuple[int, ...]:
    """Return ``struct conv`` of _native.c for inputs and outputs of these shapes."""
    rest = (*tiling.weight_shape[2:], *tiling.stride, *tiling.padding, *tiling.dilation, tiling.groups)
    return (x[0], k, *x[2:], x[1], *y[2:], y[1], *rest)
