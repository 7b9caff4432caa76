"""Per-sample convolutions in tiles: the kernels of a few samples and output channels are mixed, used and forgotten.

Those ways of :mod:`dysurgery.nn.execution` that keep no mixed kernels are made of this. All at once, B of them are
a fresh buffer of B times the weight, which costs a CPU more in page faults and cache misses than its arithmetic does,
and which autograd would keep. Here a tile of the bank is mixed into one buffer that all tiles share, and one of the
:data:`ENGINES` convolves with it. The backward pass mixes again, so that nothing is kept but x, pi and the bank.

Shapes as in :mod:`dysurgery.nn.execution`; n is the number of weights of one output channel, Cin/groups * kernel size;
c samples and R output channels are in a tile, P = H' * W' positions in a map of the output.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dysurgery.nn import native

MAX_SAMPLES = 8
"""Samples in a tile: a product of more rows mixes each of them more slowly (MKL, measured)."""


class Tiling(NamedTuple):
    """A convolution in integers only, not transposed, and the size of its tiles."""

    engine: str
    """A name in :data:`ENGINES`, :data:`FUSED` or :data:`NATIVE`."""
    rows: int
    """Output channels of a tile; all of them if groups > 1."""
    samples: int
    """Samples of a tile."""
    weight_shape: tuple[int, ...]
    """(Cout, Cin/groups, *kernel_size)."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def per_row(self) -> int:
        """Return n, see the top of this file."""
        return math.prod(self.weight_shape[1:])

    def chunks(self, batch: int) -> Iterator[slice]:
        """Yield the samples of each tile."""
        return (slice(first, min(first + self.samples, batch)) for first in range(0, batch, self.samples))

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield the output channels of each tile, and their columns in the bank."""
        for first in range(0, self.weight_shape[0], self.rows):
            last = min(first + self.rows, self.weight_shape[0])
            yield slice(first, last), slice(first * self.per_row, last * self.per_row)

    def buffer(self, batch: int, bank: Tensor) -> Tensor:
        """Return room for the mixed kernels of the largest tile."""
        return bank.new_empty(min(self.samples, batch) * min(self.rows, self.weight_shape[0]) * self.per_row)


def tiled(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, tiling: Tiling) -> Tensor:
    """Convolve each sample of x with its own mix of the bank, tile by tile; channels_last stays channels_last.

    Under autocast it computes in the lower precision, as torch's convolutions do.
    """
    device = x.device.type
    pi = pi.to(bank.dtype)
    lowered = torch.is_autocast_enabled(device)
    if lowered:
        lower = torch.get_autocast_dtype(device)
        x, pi, bank = (t if t.dtype == torch.float64 else t.to(lower) for t in (x, pi, bank))
        bias_bank = None if bias_bank is None else bias_bank.to(bank.dtype)
    if torch.compiler.is_compiling():
        compiled: Tensor = _compiled(x, pi, bank, bias_bank, *tiling)
        return compiled
    wanted = any(t is not None and t.requires_grad for t in (x, pi, bank, bias_bank))
    with torch.autocast(device, enabled=False) if lowered else nullcontext():
        if wanted and torch.is_grad_enabled():
            y: Tensor = _Tiled.apply(x, pi, bank, bias_bank, tiling)
            return y
        return _forward(x, pi, bank, bias_bank, tiling)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, tiling: Tiling) -> Tensor:
        ctx.tiling = tiling
        ctx.save_for_backward(x, pi, bank, bias_bank)
        return _forward(x, pi, bank, bias_bank, tiling)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, pi, bank, bias_bank = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph: the gradients will be differentiated again
                return (*_differentiable(gy, x, pi, bank, bias_bank, ctx.tiling, ctx.needs_input_grad), None)
            return (*_backward(gy, x, pi, bank, bias_bank, ctx.tiling, ctx.needs_input_grad), None)


# The same for torch.compile: one opaque node in its graph, as a loop over samples would be unrolled for each batch.
@torch.library.custom_op("dysurgery::tiled", mutates_args=())
def _compiled(
    x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None,
    engine: str, rows: int, samples: int, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    tiling = _tiling(engine, rows, samples, weight_shape, stride, padding, dilation, groups)
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, pi, bank, bias_bank, tiling)


@_compiled.register_fake
def _(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, *tiling: Any) -> Tensor:
    return room_for_output(x, _tiling(*tiling))


@torch.library.custom_op("dysurgery::tiled_backward", mutates_args=())
def _compiled_backward(
    gy: Tensor, x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, wanted: Sequence[bool],
    engine: str, rows: int, samples: int, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> list[Tensor]:  # fmt: skip
    tiling = _tiling(engine, rows, samples, weight_shape, stride, padding, dilation, groups)
    with torch.autocast(x.device.type, enabled=False):
        found = _backward(gy, x, pi, bank, bias_bank, tiling, tuple(wanted))
    return [gradient for gradient in found if gradient is not None]


@_compiled_backward.register_fake
def _(
    gy: Tensor, x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, wanted: Sequence[bool], *tiling: Any
) -> list[Tensor]:
    like = (_empty(x, x.shape), *(None if t is None else torch.empty_like(t) for t in (pi, bank, bias_bank)))
    return [t for t, want in zip(like, wanted, strict=True) if t is not None and want]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.tiling = inputs[4:]


def _compiled_gradients(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    found = iter(_compiled_backward(gy, *ctx.saved_tensors, list(ctx.needs_input_grad[:4]), *ctx.tiling))
    return (*(next(found) if want else None for want in ctx.needs_input_grad[:4]), *(None for _ in ctx.tiling))


_compiled.register_autograd(_compiled_gradients, setup_context=_keep)


def _tiling(engine: str, rows: int, samples: int, *rest: Any) -> Tiling:
    fields: list[Any] = [tuple(each) if isinstance(each, Sequence) else each for each in rest]
    return Tiling(engine, rows, samples, *fields)


def _forward(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, tiling: Tiling) -> Tensor:
    y = room_for_output(x, tiling)
    if tiling.engine == FUSED:
        from dysurgery.nn import fused  # Triton does not come with every torch

        fused.forward(x, pi, bank, bias_bank, y, tiling)
        return y
    bias = None if bias_bank is None else pi @ bias_bank
    if tiling.engine == NATIVE:
        native.forward(x, pi, bank, bias, y, tiling)
        return y
    buffer = tiling.buffer(x.shape[0], bank)
    for samples in tiling.chunks(x.shape[0]):
        engine = ENGINES[tiling.engine](x[samples], y[samples], tiling)
        for rows, columns in tiling.blocks():
            weight = _kernels(_mix(pi[samples], bank[:, columns], buffer), tiling)
            engine.forward(rows, weight, None if bias is None else bias[samples, rows])
    return y


def room_for_output(x: Tensor, tiling: Tiling) -> Tensor:
    """Return room for y."""
    return _empty(x, output_shape(x.shape, tiling))


def output_shape(shape: torch.Size, tiling: Tiling) -> tuple[int, ...]:
    """Return the shape of y for that of x."""
    size = (
        (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for length, padding, dilation, kernel, stride in zip(
            shape[2:], tiling.padding, tiling.dilation, tiling.weight_shape[2:], tiling.stride, strict=True
        )
    )
    return shape[0], tiling.weight_shape[0], *size


def _backward(
    gy: Tensor, x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, tiling: Tiling, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    gx = _empty(x, x.shape) if wanted[0] else None
    gpi = torch.zeros_like(pi) if wanted[1] else None
    gbias_bank = None
    if bias_bank is not None and (wanted[1] or wanted[3]):
        gbias = gy.sum(dim=tuple(range(2, gy.dim())))
        gbias_bank = pi.mT @ gbias if wanted[3] else None
        if gpi is not None:
            gpi.addmm_(gbias, bias_bank.mT)
    if tiling.engine == FUSED:
        from dysurgery.nn import fused

        if gx is not None:
            fused.input_gradient(gy, pi, bank, gx, tiling)
        if gpi is None and not wanted[2]:
            return gx, None, None, gbias_bank
        of_pi, of_bank = fused.kernel_gradients(gy, x, pi, bank, tiling)
        return gx, None if gpi is None else gpi.add_(of_pi), of_bank if wanted[2] else None, gbias_bank
    if tiling.engine == NATIVE:
        if gx is not None:
            native.input_gradient(gy, pi, bank, gx, tiling)
        if gpi is None and not wanted[2]:
            return gx, None, None, gbias_bank
        part, gbank = native.kernel_gradients(gy, x, pi, bank, tiling, (gpi is not None, wanted[2]))
        return gx, None if gpi is None or part is None else gpi.add_(part), gbank, gbias_bank
    gbank = torch.empty_like(bank) if wanted[2] else None
    buffer = tiling.buffer(x.shape[0], bank)
    gbuffer = torch.empty_like(buffer) if wanted[1] or wanted[2] else None
    for samples in tiling.chunks(x.shape[0]):
        engine = ENGINES[tiling.engine](x[samples], gy[samples], tiling)
        for rows, columns in tiling.blocks():
            tile = bank[:, columns]
            if gx is not None:
                engine.input_gradient(rows, _kernels(_mix(pi[samples], tile, buffer), tiling))
            if gbuffer is None:
                continue
            gmixed = _view(gbuffer, samples.stop - samples.start, tile.shape[1])
            engine.weight_gradient(rows, _kernels(gmixed, tiling))
            if gpi is not None:
                gpi[samples].addmm_(gmixed, tile.mT)
            if gbank is not None and samples.start == 0:
                torch.mm(pi[samples].mT, gmixed, out=gbank[:, columns])
            elif gbank is not None:
                gbank[:, columns].addmm_(pi[samples].mT, gmixed)
        if gx is not None:
            engine.collect(gx[samples])
    return gx, gpi, gbank, gbias_bank


def _differentiable(
    gy: Tensor, x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, tiling: Tiling, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return what :func:`_backward` does, by operations that autograd follows: one grouped convolution."""
    # Views, so that the way from x to pi through the gate is not counted here.
    inputs = [None if t is None else t.view_as(t) for t in (x, pi, bank, bias_bank)]
    x, pi, bank, bias_bank = inputs  # type: ignore[assignment]
    return wanted_gradients(grouped_convolution(x, pi, bank, bias_bank, tiling), gy, inputs, wanted)


def wanted_gradients(
    y: Tensor, gy: Tensor, inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients, to be differentiated again, of y in those of the inputs that are there and wanted."""
    asked = [t for t, want in zip(inputs, wanted, strict=False) if t is not None and want]
    found = iter(torch.autograd.grad(y.view(gy.shape), asked, gy, create_graph=True))
    return tuple(next(found) if t is not None and want else None for t, want in zip(inputs, wanted, strict=False))


def grouped_convolution(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, tiling: Tiling) -> Tensor:
    """Return y (1, B * Cout, *size'), by operations that autograd follows."""
    batch, _, _, shape, stride, padding, dilation, groups = x.shape[0], *tiling[1:]
    y: Tensor = torch.ops.aten.convolution(
        x.reshape(1, -1, *x.shape[2:]),
        (pi @ bank).view(batch * shape[0], *shape[1:]),
        None if bias_bank is None else (pi @ bias_bank).view(-1),
        stride, padding, dilation, False, (0,) * len(stride), batch * groups,
    )  # fmt: skip
    return y


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _mix(pi: Tensor, tile: Tensor, buffer: Tensor) -> Tensor:
    """Mix pi (c, K) and a tile of the bank (K, R * n) into the buffer, as (c, R * n)."""
    return torch.mm(pi, tile, out=_view(buffer, pi.shape[0], tile.shape[1]))


def _kernels(mixed: Tensor, tiling: Tiling) -> Tensor:
    """View (c, R * n) as (c, R, n)."""
    return mixed.view(mixed.shape[0], -1, tiling.per_row)


def is_last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, *size) are innermost in memory (channels_last)."""
    return x.stride(1) == 1 and x.shape[1] > 1


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return room for (B, C, *size) with the channels where ``like`` has them."""
    if not is_last(like):
        return like.new_empty(shape)
    # No view: what a Function returns as a view cannot be changed in place, as activations do.
    return like.new_empty_strided(shape, strides_last(shape))


def strides_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of (B, C, *size) with its channels innermost in memory."""
    strides, step = [0] * len(shape), shape[1]
    strides[1] = 1
    for axis in (*range(len(shape) - 1, 1, -1), 0):
        strides[axis], step = step, step * shape[axis]
    return tuple(strides)


class Each:
    """One torch convolution for each sample: any geometry.

    Args:
        x: (c, Cin, *size).
        y: (c, Cout, *size'), to be written by :meth:`forward`, or the gradient in it, to be read by the others.
        tiling: what to compute.
    """

    def __init__(self, x: Tensor, y: Tensor, tiling: Tiling) -> None:
        self.x, self.y, self.tiling = torch.split(x, 1), y, tiling
        self.gx: list[Tensor] = []

    def forward(self, rows: slice, weight: Tensor, bias: Tensor | None) -> None:
        """Write the output channels ``rows``, from their mixed weight (c, R, n) and bias (c, R)."""
        tiling = self.tiling
        kernels = weight.view(*weight.shape[:2], *tiling.weight_shape[1:]).unbind()
        for b, (x, kernel) in enumerate(zip(self.x, kernels, strict=True)):
            self.y[b : b + 1, rows] = F.conv2d(
                x,
                kernel,
                None if bias is None else bias[b],
                tiling.stride,
                tiling.padding,
                tiling.dilation,
                tiling.groups,
            )

    def input_gradient(self, rows: slice, weight: Tensor) -> None:
        """Add what the output channels ``rows`` contribute to the gradient in x; see :meth:`collect`."""
        kernels = weight.view(*weight.shape[:2], *self.tiling.weight_shape[1:]).unbind()
        parts = [self._gradients(b, rows, kernel, 0) for b, kernel in enumerate(kernels)]
        self.gx = [old.add_(new) for old, new in zip(self.gx, parts, strict=True)] if self.gx else parts

    def weight_gradient(self, rows: slice, gweight: Tensor) -> None:
        """Write the gradient in the mixed weight of the output channels ``rows``, (c, R, n)."""
        kernels = gweight.view(*gweight.shape[:2], *self.tiling.weight_shape[1:]).unbind()
        for b, kernel in enumerate(kernels):
            kernel.copy_(self._gradients(b, rows, kernel, 1))

    def collect(self, gx: Tensor) -> None:
        """Write the gradient in x."""
        for out, found in zip(torch.split(gx, 1), self.gx, strict=True):
            out.copy_(found)

    def _gradients(self, b: int, rows: slice, kernel: Tensor, which: int) -> Tensor:
        return _gradient(self.y[b : b + 1, rows], self.x[b], kernel, self.tiling, self.tiling.groups, which)


def _gradient(gy: Tensor, x: Tensor, kernel: Tensor, tiling: Tiling, groups: int, which: int) -> Tensor:
    """Return the gradient of one torch convolution in x (which = 0) or in the kernel (1), of which the shape counts."""
    mask = [which == 0, which == 1, False]
    rest = (tiling.stride, tiling.padding, tiling.dilation, False, (0,) * len(tiling.stride), groups, mask)
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(gy, x, kernel, None, *rest)
    return found[which]


def side_by_side(x: Tensor) -> Tensor:
    """Return (c, C, *size) as (1, c * C, *size) in channels_last."""
    return x.movedim((0, 1), (-2, -1)).reshape(1, *x.shape[2:], x.shape[0] * x.shape[1]).movedim(-1, 1)


def apart(packed: Tensor, c: int) -> Tensor:
    """Undo :func:`side_by_side`: return (1, c * C, *size) as (c, C, *size)."""
    size = packed.shape[2:]
    return packed.movedim(1, -1).reshape(*size, c, packed.shape[1] // c).movedim((-2, -1), (0, 1))


class Packed:
    """The samples of a tile side by side, in one torch convolution with as many times the groups: any geometry."""

    def __init__(self, x: Tensor, y: Tensor, tiling: Tiling) -> None:
        self.y, self.tiling = y, tiling
        # On small maps oneDNN convolves dense kernels faster in NCHW, even with the copies.
        self.last = is_last(x) and (tiling.groups > 1 or y.shape[2] * y.shape[3] >= PACKED_LAST)
        self.x = self._pack(x)
        self.gy: Tensor | None = None
        self.gx: Tensor | None = None

    def forward(self, rows: slice, weight: Tensor, bias: Tensor | None) -> None:
        tiling, c = self.tiling, self.y.shape[0]
        found = F.conv2d(
            self.x, self._kernel(weight), None if bias is None else bias.flatten(),
            tiling.stride, tiling.padding, tiling.dilation, c * tiling.groups,
        )  # fmt: skip
        self.y.copy_(self._unpack(found))

    def input_gradient(self, rows: slice, weight: Tensor) -> None:
        self.gx = self._gradients(weight, 0)

    def weight_gradient(self, rows: slice, gweight: Tensor) -> None:
        self._kernel(gweight).copy_(self._gradients(gweight, 1))

    def collect(self, gx: Tensor) -> None:
        assert self.gx is not None
        gx.copy_(self._unpack(self.gx))

    def _pack(self, x: Tensor) -> Tensor:
        return side_by_side(x) if self.last else x.reshape(1, -1, *x.shape[2:])

    def _unpack(self, packed: Tensor) -> Tensor:
        c = self.y.shape[0]
        return apart(packed, c) if self.last else packed.reshape(c, -1, *packed.shape[2:])

    def _kernel(self, weight: Tensor) -> Tensor:
        """View (c, Cout, n) as the weight of one convolution."""
        return weight.view(-1, *self.tiling.weight_shape[1:])

    def _gradients(self, weight: Tensor, which: int) -> Tensor:
        self.gy = self._pack(self.y) if self.gy is None else self.gy
        groups = self.y.shape[0] * self.tiling.groups
        return _gradient(self.gy, self.x, self._kernel(weight), self.tiling, groups, which)


PACKED_LAST = 128
"""Positions of an output from which :class:`Packed` keeps channels_last for dense kernels."""


class Product:
    """Batched matrix products, for 1x1 kernels of stride 1 without padding; nothing is copied in either layout."""

    def __init__(self, x: Tensor, y: Tensor, tiling: Tiling) -> None:
        self.last = is_last(x)
        # (c, P, C) in channels_last, else (c, C, P); y is written through, its gradient may be laid out in any way.
        self.x, self.y = (t.movedim(1, -1).flatten(1, -2) if self.last else t.flatten(2) for t in (x, y))
        self.gx: Tensor | None = None

    def forward(self, rows: slice, weight: Tensor, bias: Tensor | None) -> None:
        if self.last:
            product(self.x, weight.mT, None if bias is None else bias.unsqueeze(1), self.y[:, :, rows])
        else:
            product(weight, self.x, None if bias is None else bias.unsqueeze(2), self.y[:, rows])

    def input_gradient(self, rows: slice, weight: Tensor) -> None:
        pair = (self.y[:, :, rows], weight) if self.last else (weight.mT, self.y[:, rows])
        self.gx = torch.bmm(*pair) if self.gx is None else self.gx.baddbmm_(*pair)

    def weight_gradient(self, rows: slice, gweight: Tensor) -> None:
        if self.last:
            torch.bmm(self.y[:, :, rows].mT, self.x, out=gweight)
        else:
            torch.bmm(self.y[:, rows], self.x.mT, out=gweight)

    def collect(self, gx: Tensor) -> None:
        assert self.gx is not None
        (gx.movedim(1, -1) if self.last else gx).view(self.gx.shape).copy_(self.gx)


class Columns:
    """The same on patches (im2col), for small maps with wide channels: (c, P, n) @ (c, n, R). Two axes, no groups."""

    def __init__(self, x: Tensor, y: Tensor, tiling: Tiling) -> None:
        self.size = (x.shape[2], x.shape[3])
        self.window = (tiling.weight_shape[2:], tiling.dilation, tiling.padding, tiling.stride)
        self.x, self.y = F.unfold(x, *self.window).mT, y
        self.gx: Tensor | None = None

    def forward(self, rows: slice, weight: Tensor, bias: Tensor | None) -> None:
        if is_last(self.y):
            out = self.y.movedim(1, -1).flatten(1, 2)[:, :, rows]
            product(self.x, weight.mT, None if bias is None else bias.unsqueeze(1), out)
            return
        # Row by row of positions it is faster, even with the copy of the result.
        found = torch.bmm(self.x, weight.mT).mT
        self.y[:, rows] = (found if bias is None else found.add_(bias.unsqueeze(2))).view(self.y[:, rows].shape)

    def input_gradient(self, rows: slice, weight: Tensor) -> None:
        pair = (self._gradient(rows), weight)
        self.gx = torch.bmm(*pair) if self.gx is None else self.gx.baddbmm_(*pair)

    def weight_gradient(self, rows: slice, gweight: Tensor) -> None:
        torch.bmm(self._gradient(rows).mT, self.x, out=gweight)

    def collect(self, gx: Tensor) -> None:
        assert self.gx is not None
        gx.copy_(F.fold(self.gx.mT, self.size, *self.window))

    def _gradient(self, rows: slice) -> Tensor:
        """Return the gradient in y as (c, P, R), contiguous."""
        return self.y[:, rows].movedim(1, -1).flatten(1, 2).contiguous()


NARROW = 16
"""Columns of a product below which MKL takes several times as long as for the transposed one (measured)."""


def product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return the batched matrix product with the bias added, written to ``out`` if that is given."""
    # Nothing is asked of a graph that may be for any number of columns.
    if not torch.compiler.is_compiling() and b.shape[-1] < NARROW <= a.shape[-2]:
        found = product(b.mT, a.mT, None if bias is None else bias.mT).mT
        return found.contiguous() if out is None else out.copy_(found)
    return torch.bmm(a, b, out=out) if bias is None else torch.baddbmm(bias, a, b, out=out)


ENGINES: dict[str, Any] = {"each": Each, "packed": Packed, "product": Product, "columns": Columns}
"""What convolves with a tile of mixed kernels; the methods of all are those of :class:`Each`."""

FUSED = "fused"
"""The engine that is no loop over tiles but one GPU kernel: :mod:`dysurgery.nn.fused`."""

NATIVE = "native"
"""The engine that is one call of compiled C: :mod:`dysurgery.nn.native`."""
