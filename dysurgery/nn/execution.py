"""The ways to run one convolution per sample, each with its own mixed kernel, and the choice among them.

Every way takes ``(x, pi, bank, bias_bank, geometry)`` and computes, for sample b, ``W_b = sum_k pi_bk W_k``,
``bias_b = sum_k pi_bk bias_k`` and ``y_b = conv(x_b, W_b) + bias_b`` (Chen et al., CVPR 2020, section 3). A new way
is a function entered in :data:`WAYS`, a condition in :func:`covers` and a line in :func:`choose`; the layers call
:func:`convolve` and see no more. :func:`choose` is the chooser of every layer, unless
:func:`dysurgery.autotune` measured a better one; :mod:`dysurgery.export` sets another in the copy that it writes.

========  ==============================================================  =====================================
way       what it does                                                    where :func:`choose` takes it
========  ==============================================================  =====================================
single    one ordinary convolution                                        one sample
matmul    one batched matrix product                                      1x1, kernels of the batch to 4 MiB
products  the same in tiles of 256 output channels and 8 samples          1x1, beyond that, with one thread
                                                                          or in training
grouped   one convolution of B * groups groups, what everyone does        NCHW: depthwise to 2 million values, dense
                                                                          with kernels of the batch to 6 MiB;
                                                                          whatever no other way covers; a GPU
returned  the same and back to channels_last                              channels_last, in training: narrow dense on
                                                                          small maps, depthwise of 5x5
stacked   the same with the samples side by side in channels_last         channels_last: depthwise to a million values,
                                                                          dense to a quarter of it
packed    grouped for as many samples at a time as fit into 3 MiB,        beyond these, to 131 thousand weights
          2 to 32
each      a convolution for each sample, kernels of 8 samples at a time   beyond that; maps that do not fit
blocks    the same for 128 output channels at a time                      wide dense layers on small maps, NCHW
columns   im2col and products, 64 output channels at a time               the same in channels_last, in training,
                                                                          or for one sample
native    one call of compiled C (:mod:`native`)                          channels_last in float32, where it was
                                                                          compiled; in training from 16 outputs or
                                                                          12 inputs on
outputs   one ordinary convolution to K * Cout channels, outputs mixed    nowhere
fused     a GPU kernel that mixes as it multiplies (:mod:`fused`)         nowhere
========  ==============================================================  =====================================

``one by one`` is a loop inside the graph, for ONNX alone. ``products``, ``packed``, ``each``, ``blocks``, ``columns``
and ``native`` keep no mixed kernels for the backward pass (:mod:`tiles`). They are for a CPU, in eager mode and, as one
node of the graph, under torch.compile; under torch.export and torch.func, and on a GPU, the others are taken, which are
plain operations. Where ``native`` is taken and nobody looks, pooling and gate are in the same call, and what follows
the layer if it was told; with a backward pass they are one step for autograd (:mod:`whole`, :func:`in_one_call`).
The thresholds were measured on one core with AVX-512 in float32, at batch 8, 32 and 128.
``outputs`` and ``fused`` are for a GPU, where nothing was measured yet: :func:`dysurgery.autotune` tries them there.
Not here, as they never won: mixed inputs, shifted sums (neither as one loop of a compiled graph), vmap.

Shapes: x (B, Cin, *size) with one to three axes of size, pi (B, K), bank (K, weights of one kernel), bias_bank
(K, Cout), y (B, Cout, *size').
"""

import math
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import scan
from torch.nn import functional as F
from torch.utils._triton import has_triton

from dysurgery.nn.attention import Gate
from dysurgery.nn.epilogue import Epilogue
from dysurgery.nn.native import are_flat, computes, layer_node, numbers
from dysurgery.nn.native import available as compiled_c
from dysurgery.nn.native import layer as layer_in_c
from dysurgery.nn.native import pool as pool_in_c
from dysurgery.nn.rows import compiled, eager
from dysurgery.nn.rows import product as row_product
from dysurgery.nn.tiles import (
    FUSED,
    MAX_SAMPLES,
    NATIVE,
    Tiling,
    apart,
    is_last,
    output_shape,
    product,
    side_by_side,
    strides_last,
    tiled,
)  # fmt: skip
from dysurgery.nn.whole import whole


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
Chooser = Callable[[Tensor, Geometry, bool], str]
"""Given the input, the geometry and whether there will be a backward pass, a name in :data:`WAYS`."""


def mix(pi: Tensor, bank: Tensor) -> Tensor:
    """Aggregate: weights pi (B, K) and bank (K, N) to one mixed row per sample (B, N)."""
    return row_product(pi.to(bank.dtype), bank)


def pool(x: Tensor) -> Tensor:
    """Return the mean over the positions of x (B, C, *size), which the gate sees, as (B, C)."""
    if _is_whole(x) and computes(x):
        return pool_in_c(x)
    return x.mean(dim=tuple(range(2, x.dim())))


def _is_whole(x: Tensor) -> bool:
    """Whether x is (B, C, H, W) in channels_last without gaps, as compiled C takes it by its address."""
    return x.is_contiguous(memory_format=torch.channels_last) and x.size(1) > 1


def single(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One ordinary convolution, for at most one sample."""
    # The sum is pi itself for one sample, and zeros of the right shape for an empty batch.
    if pi.shape[0] != 1:
        pi = pi.sum(dim=0, keepdim=True)
    weight = mix(pi, bank).view(geometry.weight_shape)
    bias = None if bias_bank is None else mix(pi, bias_bank).view(-1)
    return _convolution(x, weight, bias, geometry, geometry.groups)


def matmul(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One batched matrix product, for 1x1 kernels without padding; keeps NCHW and channels_last as they come."""
    x = _strided(x, geometry)
    batch, channels, *size = x.shape
    positions = math.prod(size)  # Size.numel() would be a constant in an exported graph
    weight = mix(pi, bank).view(batch, geometry.out_channels, channels)
    bias = None if bias_bank is None else mix(pi, bias_bank)
    if is_last(x):
        # Pixels are rows, so that nothing is copied.
        rows = x.movedim(1, -1).reshape(batch, positions, channels)
        y = product(rows, weight.transpose(1, 2), None if bias is None else bias.unsqueeze(1))
        return y.view(batch, *size, geometry.out_channels).movedim(-1, 1)
    y = product(weight, x.reshape(batch, channels, positions), None if bias is None else bias.unsqueeze(2))
    return y.view(batch, geometry.out_channels, *size)


def grouped(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution with B * groups groups over all samples side by side: covers every geometry."""
    batch, channels = x.shape[:2]
    rows, *kernel = geometry.weight_shape
    weight = mix(pi, bank).view(batch * rows, *kernel)
    bias = None if bias_bank is None else mix(pi, bias_bank).view(-1)
    y = _convolution(x.reshape(1, batch * channels, *x.shape[2:]), weight, bias, geometry, batch * geometry.groups)
    return y.view(batch, geometry.out_channels, *y.shape[2:])


def returned(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """As :func:`grouped`, and back to channels_last if x was so."""
    return _laid_out_as(x, grouped(x, pi, bank, bias_bank, geometry))


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


def stacked(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """As :func:`grouped`, but with the channels innermost: (1, *size, B * Cin) instead of (1, B * Cin, *size)."""
    batch = x.shape[0]
    rows, *kernel = geometry.weight_shape
    weight = mix(pi, bank).view(batch * rows, *kernel)
    bias = None if bias_bank is None else mix(pi, bias_bank).view(-1)
    y = _convolution(side_by_side(x), weight, bias, geometry, batch * geometry.groups)
    return apart(y, batch).movedim(1, -1).contiguous().movedim(-1, 1)


def products(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """As :func:`matmul`, in tiles."""
    dense = geometry._replace(stride=(1,) * len(geometry.stride))
    return tiled(_strided(x, geometry), pi, bank, bias_bank, _tiling("product", 256, dense))


def each(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution for each sample."""
    return tiled(x, pi, bank, bias_bank, _tiling("each", geometry.out_channels, geometry))


def packed(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """As :func:`grouped`, for as many samples at a time as the cache holds."""
    tiling = _tiling("packed", geometry.out_channels, geometry, _together(x, geometry))
    return tiled(x, pi, bank, bias_bank, tiling)


def blocks(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One convolution for each sample and 128 output channels, whose kernels stay in the cache."""
    return tiled(x, pi, bank, bias_bank, _tiling("each", 128, geometry))


def columns(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """Patches (im2col) and one batched matrix product for 64 output channels."""
    return tiled(x, pi, bank, bias_bank, _tiling("columns", 64, geometry))


def native(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One call of compiled C, which mixes as it multiplies, on a CPU."""
    return tiled(x, pi, bank, bias_bank, _tiling(NATIVE, geometry.out_channels, geometry))


def outputs(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """One ordinary convolution with all K kernels, whose outputs are mixed: K times the Mult-Adds, in one call."""
    k, (rows, *kernel), groups = bank.shape[0], geometry.weight_shape, geometry.groups
    # A group of the convolution holds that group of all kernels.
    weight = bank.view(k, groups, rows // groups, *kernel).transpose(0, 1).reshape(k * rows, *kernel)
    y = _convolution(x, weight, None, geometry, groups)
    batch, _, *size = y.shape
    each = y.view(batch, groups, k, rows // groups, *size)
    weights = pi.to(y.dtype).view(batch, 1, k, *(1 for _ in range(each.dim() - 3)))
    mixed = (each * weights).sum(dim=2).view(batch, rows, *size)
    if bias_bank is not None:
        mixed = mixed + mix(pi, bias_bank).to(y.dtype).view(batch, rows, *(1 for _ in size))
    return _laid_out_as(x, mixed)


def fused(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry) -> Tensor:
    """An implicit GEMM that mixes the bank as it goes, on a GPU."""
    return tiled(x, pi, bank, bias_bank, _tiling(FUSED, geometry.out_channels, geometry))


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int) -> Tensor:
    """Run torch's own convolution of this geometry, with another number of groups."""
    _, stride, padding, dilation, _, transposed, output_padding = geometry
    convolutions: Any = _TRANSPOSED if transposed else _CONVOLUTIONS
    order = (output_padding, groups, dilation) if transposed else (dilation, groups)
    y: Tensor = convolutions[x.dim() - 3](x, weight, bias, stride, padding, *order)
    return y


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y in channels_last if x is so."""
    return y.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and is_last(x) else y


def _strided(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the positions of x that a 1x1 kernel sees."""
    if all(step == 1 for step in geometry.stride):
        return x
    return x[(slice(None), slice(None), *(slice(None, None, step) for step in geometry.stride))]


def _tiling(engine: str, rows: int, geometry: Geometry, samples: int = MAX_SAMPLES) -> Tiling:
    padding = _padding(geometry)
    assert padding is not None
    shape, stride, _, dilation, groups = geometry[:5]
    return Tiling(engine, min(rows, shape[0]), samples, shape, stride, padding, dilation, groups)


def _padding(geometry: Geometry) -> tuple[int, ...] | None:
    """Return the padding as integers, or None if it is not the same before and behind."""
    if geometry.padding == "valid":
        return (0,) * len(geometry.stride)
    if not isinstance(geometry.padding, str):
        return geometry.padding
    total = [step * (size - 1) for step, size in zip(geometry.dilation, geometry.weight_shape[2:], strict=True)]
    return None if any(length % 2 for length in total) else tuple(length // 2 for length in total)


WAYS: dict[str, Way] = {
    "single": single,
    "matmul": matmul,
    "products": products,
    "grouped": grouped,
    "returned": returned,
    "stacked": stacked,
    "each": each,
    "packed": packed,
    "blocks": blocks,
    "columns": columns,
    "native": native,
    "outputs": outputs,
    "fused": fused,
    "one by one": one_by_one,
}
TILED = ("products", "each", "packed", "blocks", "columns", "native", "fused")
"""The ways that are no plain operations."""


def covers(way: str, x: Tensor, geometry: Geometry) -> bool:
    """Whether this way may be used for an input like x."""
    batch, padding = x.shape[0], _padding(geometry)
    if way == "single":
        return batch <= 1
    if batch == 0:
        return False
    if way in ("matmul", "products"):
        return _is_product(geometry)
    if way in ("grouped", "one by one"):
        return True
    if way == "outputs":
        return not geometry.transposed
    if way == "fused" and not _has_triton(x):
        return False
    if len(geometry.stride) != 2 or geometry.transposed or padding is None or x.numel() == 0:
        return False
    if way == "native":
        return _has_native(x, geometry)
    return way in ("each", "packed", "returned", "stacked") or geometry.groups == 1


def _has_native(x: Tensor, geometry: Geometry) -> bool:
    """Whether the compiled module is there and takes this: maps in channels_last, float32, dense or depthwise."""
    if not (compiled_c() and is_last(x) and x.dtype == torch.float32 and x.device.type == "cpu"):
        return False
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        return False  # somebody counts or records operations, of which C is none
    depthwise = x.shape[1] == geometry.out_channels == geometry.groups >= _VECTOR
    return (depthwise or geometry.groups == 1) and not torch.is_autocast_enabled("cpu")


def _has_triton(x: Tensor) -> bool:
    """Whether Triton's kernels run on the device of x: on a GPU, or in the interpreter."""
    return has_triton() if x.device.type == "cuda" else bool(os.environ.get("TRITON_INTERPRET"))


def _is_product(geometry: Geometry) -> bool:
    """Whether it is a plain 1x1; 'same' pads that by nothing."""
    padding, pointwise = _padding(geometry), all(size == 1 for size in geometry.weight_shape[2:])
    return pointwise and geometry.groups == 1 and not geometry.transposed and padding is not None and not any(padding)


MIB = 2**20
_WIDE = 1_000_000
"""Weights from which a dense kernel no longer passes through the cache in one piece."""
_NARROW = 2**17
"""Weights up to which samples are packed: beyond that, the kernels of two or more do not stay in the cache."""
_VECTOR = 16
"""Channels from which compiled C is fast: the floats of an AVX-512 register."""
_SOME = 12
"""Channels of the input from which it is fast in training too, with fewer outputs than that."""
_SMALL_MAP = 64
"""Positions of an output below which those are slow as convolutions."""


def choose(x: Tensor, geometry: Geometry, train: bool = False) -> str:
    """Return the name of the way for this input: from static facts only, so that it compiles without a graph break.

    Args:
        x: the input; its shape, layout, type and device count.
        geometry: of the convolution.
        train: whether there will be a backward pass.
    """
    batch, weights, compiling = x.shape[0], math.prod(geometry.weight_shape), compiled()
    if batch <= 1 and train:
        return "single"
    plain = x.device.type != "cpu" or not (compiling or eager())
    # A compiled graph serves many batch sizes: it would be compiled again for each answer.
    kernels = (MAX_SAMPLES if compiling else batch) * weights * x.element_size()
    large = kernels > 4 * MIB
    if not plain and covers("native", x, geometry) and _prefers_c(x, geometry, train, kernels):
        return "native"
    if batch <= 1 and compiling and weights <= _WIDE:
        return "single"
    if covers("matmul", x, geometry) and batch > 1:
        # Several threads share one product better than the tiles of one.
        tiles = compiling or train or torch.get_num_threads() == 1
        return "products" if large and not plain and tiles else "matmul"
    if plain or not covers("each", x, geometry):
        return "single" if batch <= 1 else "grouped"
    last, elements = is_last(x), math.prod(x.shape[1:])
    positions = math.prod(x.shape[2:]) // math.prod(geometry.stride)
    wide = geometry.groups == 1 and weights > _WIDE and positions <= _SMALL_MAP
    if batch == 1:
        return "columns" if wide else "single"
    if wide:
        return "columns" if last or train else "blocks"
    # In a compiled graph nothing is asked about the batch from here on.
    total = batch * elements
    if geometry.groups == 1:
        if compiling:
            return _several(x, geometry) if large or last else "grouped"
        if not last:
            return "grouped" if kernels <= 6 * MIB else _several(x, geometry)
        several = _several(x, geometry)
        if several == "each":
            return several
        if total <= 2**18 and kernels <= 2 * MIB:
            return "stacked"
        return "returned" if train and elements <= 2**13 and kernels <= 6 * MIB else several
    if not last and elements >= 250_000:
        return "each"
    if geometry.groups < x.shape[1]:
        many = last or (not compiling and (train or total >= 2_000_000))
        return _several(x, geometry) if many else "grouped"
    if not last:
        many = not compiling and total >= (1_600_000 if train else 2_000_000)
        return _several(x, geometry) if many else "grouped"
    if train and max(geometry.weight_shape[2:]) > 3:
        return "returned"  # the backward pass of a wide 5x5 depthwise convolution in channels_last is slow
    if compiling:
        return _several(x, geometry) if elements >= (250_000 if train else 64_000) else "stacked"
    return "stacked" if total <= 2**20 else _several(x, geometry)


def _prefers_c(x: Tensor, geometry: Geometry, train: bool, kernels: int) -> bool:
    """Whether compiled C is faster than torch's operations, where it can be used (measured)."""
    if not train:
        return True
    if _is_product(geometry) and compiled() and x.shape[0] > 1 and kernels <= 2 * MIB:
        # MKL is as fast while the mixed kernels, of so many bytes, stay in the cache; in eager mode C has the rest of
        # the layer in the same step.
        return False
    return geometry.groups > 1 or geometry.out_channels >= _VECTOR or x.shape[1] >= _SOME


def _several(x: Tensor, geometry: Geometry) -> str:
    """Return the way for more samples than one convolution should take."""
    return "packed" if math.prod(geometry.weight_shape) <= _NARROW and _together(x, geometry) > 1 else "each"


def _together(x: Tensor, geometry: Geometry) -> int:
    """Return how many samples :func:`packed` takes at a time: up to 3 MiB of maps and kernels, by a cache of 2 MiB."""
    positions = math.prod(x.shape[2:]) // math.prod(geometry.stride)
    one = math.prod(x.shape[1:]) + geometry.out_channels * positions + math.prod(geometry.weight_shape)
    # With groups of several channels oneDNN is fast for fewer.
    depthwise_or_dense = geometry.groups in (1, x.shape[1])
    room = (3 if depthwise_or_dense else 1.4) * MIB / x.element_size()
    return next((samples for samples in (32, 16, 8, 4, 2) if samples * one <= room), 1)


class Situation(NamedTuple):
    """What the fastest way of a layer depends on. As text: ``cpu 2 float32 nhwc 8x96x56x56 infer``."""

    device: str
    """Its type."""
    threads: int
    """That torch computes with on a CPU; 0 elsewhere."""
    dtype: str
    """Of the computation, so that of autocast where it is on."""
    layout: str
    """``nhwc`` if the channels of x are innermost in memory, else ``nchw``."""
    shape: tuple[int, ...]
    """Of x."""
    mode: str
    """``train`` if there will be a backward pass, else ``infer``."""

    @classmethod
    def of(cls, x: Tensor, train: bool) -> "Situation":
        """Return the situation now."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        threads = torch.get_num_threads() if device == "cpu" else 0
        layout, mode = "nhwc" if is_last(x) else "nchw", "train" if train else "infer"
        return cls(device, threads, _NAMES[dtype], layout, tuple(x.shape), mode)

    @classmethod
    def parse(cls, text: str) -> "Situation":
        """Read the text again.

        Raises:
            ValueError: if it is none.
        """
        device, threads, dtype, layout, shape, mode = text.split(" ")
        return cls(device, int(threads), dtype, layout, tuple(map(int, shape.split("x"))), mode)

    def __str__(self) -> str:
        return " ".join(map(str, (*self[:4], "x".join(map(str, self.shape)), self.mode)))


# As the name of a type is asked for at each call, and str() is slow.
_NAMES = {each: str(each).removeprefix("torch.") for each in vars(torch).values() if isinstance(each, torch.dtype)}


class Tuned:
    """A chooser that knows what was measured (:func:`dysurgery.autotune`), and asks :func:`choose` elsewhere.

    Args:
        ways: situation -> name in :data:`WAYS`; a name that this version does not know is left out.
    """

    def __init__(self, ways: Mapping[Situation, str]) -> None:
        self.ways = {situation: way for situation, way in ways.items() if way in WAYS}

    def __call__(self, x: Tensor, geometry: Geometry, train: bool = False) -> str:
        # A compiled graph of a GPU runs what was measured, and is another for each batch; that of a CPU does not.
        measured = eager() or (compiled() and x.device.type != "cpu")
        way = self.ways.get(Situation.of(x, train)) if measured else None
        return choose(x, geometry, train) if way is None else way


def choose_for_any_batch(x: Tensor, geometry: Geometry, train: bool = False) -> str:
    """The same for a graph that is to run on any number of samples: never look at how many there are."""
    return "matmul" if _is_product(geometry) else "grouped"


def choose_for_onnx(x: Tensor, geometry: Geometry, train: bool = False) -> str:
    """The same where, beyond that, the number of groups is a constant."""
    return "matmul" if _is_product(geometry) else "one by one"


def convolve(
    x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry, chooser: Chooser = choose
) -> Tensor:
    """Run the convolution the way that ``chooser`` says."""
    train = torch.is_grad_enabled() and (bank.requires_grad or x.requires_grad or pi.requires_grad)
    return WAYS[chooser(x, geometry, train)](x, pi, bank, bias_bank, geometry)


def linear(x: Tensor, pi: Tensor, bank: Tensor, bias_bank: Tensor | None) -> Tensor:
    """Map x (B, N, Cin) to (B, N, Cout) with one mixed matrix (Cout, Cin) per sample; bank (K, Cout * Cin)."""
    weight = mix(pi, bank).view(x.shape[0], bank.shape[1] // x.shape[2], x.shape[2])
    bias = None if bias_bank is None else mix(pi, bias_bank).unsqueeze(1)
    return product(x, weight.transpose(1, 2), bias)


def in_one_call(
    x: Tensor, gate: Gate, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry, chooser: Chooser = choose,
    epilogue: Epilogue | None = None, source: Epilogue | None = None,
) -> Tensor | None:  # fmt: skip
    """Run a whole layer, from pooling on, as one call of compiled C, if ``chooser`` goes that way and nobody looks.

    Operations that each take a microsecond are half the time of a layer at batch 1. With an ``epilogue`` the
    activation that follows is in it; ``source`` is that of the layer before, which may know the mean of x.
    """
    if not _is_whole(x) or gate._forward_hooks or gate._forward_pre_hooks:
        return None
    if torch.is_grad_enabled() and (bank.requires_grad or x.requires_grad):
        return _trained(x, gate, bank, bias_bank, geometry, chooser)
    if compiled():
        return _as_one_node(x, gate, bank, bias_bank, geometry, chooser, epilogue, source)
    parameters = gate.plain_parameters()
    if parameters is None or not computes(x):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in parameters + _present(bias_bank)):
        return None
    call = _one_call(chooser, x.shape, bank.shape[0], geometry, torch.get_num_threads())
    if call is None:
        return None
    shape, strides, conv = call
    y = x.new_empty_strided(shape, strides)
    if 0 in shape:
        return y
    known = None if source is None else source.mean(x)
    mean = x.new_empty_strided(shape[:2], (shape[1], 1)) if epilogue is not None and epilogue.averages else None
    done = layer_in_c(
        x, parameters, bank, bias_bank, y, conv, sigmoid=gate.name == "sigmoid", known=known, mean=mean,
        activation=0 if epilogue is None else epilogue.activation,
    )  # fmt: skip
    if not done:
        return None
    if epilogue is not None:
        epilogue.note(y, mean)
    return y


def _trained(
    x: Tensor, gate: Gate, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry, chooser: Chooser
) -> Tensor | None:
    """The same with a backward pass: one step for autograd."""
    parameters = gate.plain_parameters()
    if parameters is None or not eager() or not covers("native", x, geometry):
        return None
    if not are_flat((bank, *parameters, *_present(bias_bank))) or parameters[-1].requires_grad:
        return None
    if chooser(x, geometry, True) != "native":
        return None
    tiling = _tiling(NATIVE, geometry.out_channels, geometry)
    return whole(x, parameters, bank, bias_bank, tiling, sigmoid=gate.name == "sigmoid")


def _as_one_node(
    x: Tensor, gate: Gate, bank: Tensor, bias_bank: Tensor | None, geometry: Geometry, chooser: Chooser,
    epilogue: Epilogue | None, source: Epilogue | None,
) -> Tensor | None:  # fmt: skip
    """The same for torch.compile: a node of its graph, if it may be."""
    parameters = gate.plain_parameters()
    if parameters is None or not covers("native", x, geometry) or chooser(x, geometry, False) != "native":
        return None
    tensors = (bank, *parameters, *_present(bias_bank))
    if not are_flat(tensors) or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))):
        return None
    padding = _padding(geometry)
    assert padding is not None
    shape, stride, _, dilation, groups = geometry[:5]
    window = [*shape[2:], *stride, *padding, *dilation, groups]
    known = None if source is None else source.mean(x)
    activation, averages = (0, False) if epilogue is None else (epilogue.activation, epilogue.averages)
    y, mean = layer_node(
        x, list(parameters), bank, bias_bank, gate.name == "sigmoid", shape[0], window, known, activation, averages
    )
    if epilogue is not None:
        epilogue.note(y, mean if averages else None)
    return y


def _present(bias_bank: Tensor | None) -> tuple[Tensor, ...]:
    return () if bias_bank is None else (bias_bank,)


@lru_cache(maxsize=4096)
def _one_call(
    chooser: Chooser, shape: torch.Size, k: int, geometry: Geometry, threads: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Return shape and strides of y and what C is told, if ``chooser`` takes it for x of this shape, else None.

    A chooser may ask torch for the number of threads, so that it is part of what is remembered.
    """
    x = torch.empty(shape[1]).as_strided(shape, (0, 1, 0, 0))
    if chooser(x, geometry, False) != "native":
        return None
    tiling = _tiling(NATIVE, geometry.out_channels, geometry)
    y = torch.Size(output_shape(shape, tiling))
    return y, strides_last(y), numbers(shape, y, k, tiling)
