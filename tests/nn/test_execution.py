import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dysurgery.nn import native, tiles
from dysurgery.nn.execution import (
    TILED,
    WAYS,
    Geometry,
    choose,
    choose_for_any_batch,
    choose_for_onnx,
    convolve,
    covers,
)

CASES = {
    "1x1": Geometry((6, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 strided": Geometry((6, 4, 1, 1), (2, 3), (0, 0), (1, 1), 1),
    "1x1 same": Geometry((6, 4, 1, 1), (1, 1), "same", (1, 1), 1),
    "1x1 padded": Geometry((6, 4, 1, 1), (1, 1), (1, 1), (1, 1), 1),
    "1x1 grouped": Geometry((6, 2, 1, 1), (1, 1), (0, 0), (1, 1), 2),
    "3x3": Geometry((6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 strided, dilated": Geometry((6, 4, 3, 3), (2, 1), (2, 2), (2, 2), 1),
    "depthwise": Geometry((4, 1, 3, 3), (1, 1), "same", (1, 1), 4),
    "grouped, even": Geometry((6, 2, 2, 4), (1, 2), "valid", (1, 1), 2),
    "1 axis": Geometry((6, 2, 3), (2,), (1,), (2,), 2),
    "1 axis, pointwise": Geometry((6, 4, 1), (2,), (0,), (1,), 1),
    "3 axes": Geometry((6, 2, 2, 3, 1), (1, 2, 1), (1, 0, 0), (1, 1, 2), 2),
    "3 axes, pointwise": Geometry((6, 4, 1, 1, 1), (1, 2, 1), (0, 0, 0), (1, 1, 1), 1),
    "transposed": Geometry((4, 3, 3, 2), (2, 1), (1, 0), (1, 2), 2, True, (1, 0)),
    "transposed, 1x1": Geometry((4, 6, 1, 1), (1, 1), (0, 0), (1, 1), 1, True, (0, 0)),
    "transposed, 1 axis": Geometry((4, 6, 3), (2,), (1,), (1,), 1, True, (1,)),
    "transposed, 3 axes": Geometry((4, 3, 2, 2, 2), (2, 2, 2), (0, 0, 1), (1, 1, 1), 2, True, (0, 1, 0)),
}
SIZE = (7, 8, 5)


def covered(way, case, batch):
    """Whether this way may be used for the case."""
    return covers(way, torch.empty(batch, 4, *SIZE[: len(CASES[case].stride)]), CASES[case])


def defined(x, pi, weights, biases, geometry):
    """The definition: torch's own convolution of each sample with its own kernel."""
    axes = len(geometry.stride)
    padded = (geometry.padding, geometry.output_padding) if geometry.transposed else (geometry.padding,)
    rest = (geometry.groups, geometry.dilation) if geometry.transposed else (geometry.dilation, geometry.groups)
    function = getattr(F, f"conv_transpose{axes}d" if geometry.transposed else f"conv{axes}d")

    def convolution(x, weight, bias):
        return function(x, weight, bias, geometry.stride, *padded, *rest)

    rows = [
        convolution(x[b : b + 1], torch.tensordot(pi[b], weights, 1), None if biases is None else pi[b] @ biases)
        for b in range(len(x))
    ]
    return torch.cat(rows) if rows else convolution(x, weights[0], None)


@pytest.mark.parametrize(
    ("way", "case", "batch"),
    [
        (way, case, batch)
        for way in WAYS
        for case in CASES
        for batch in (0, 1, 3)
        if way != "one by one" and covered(way, case, batch)  # that is for inference: below
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_way_equals_the_definition_wherever_it_may_be_used(way, case, bias, channels_last, batch):
    geometry, k = CASES[case], 3
    torch.manual_seed(0)
    axes = len(geometry.stride)
    x = torch.randn(batch, 4, *SIZE[:axes], dtype=torch.float64)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    pi = torch.softmax(torch.randn(batch, k, dtype=torch.float64), dim=1)
    weights = torch.randn(k, *geometry.weight_shape, dtype=torch.float64)
    biases = torch.randn(k, geometry.out_channels, dtype=torch.float64) if bias else None
    inputs = [t.requires_grad_() for t in (x, pi, weights, biases) if t is not None]

    y, reference = WAYS[way](x, pi, weights.view(k, -1), biases, geometry), defined(x, pi, weights, biases, geometry)
    assert y.shape == reference.shape
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    if batch:
        direction = torch.randn_like(y)
        found, expected = (torch.autograd.grad(out, inputs, direction) for out in (y, reference))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@st.composite
def geometries(draw):
    """Any geometry that torch takes, with its number of input channels."""
    axes, groups, transposed = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])), draw(st.booleans())

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(min(p, d * (s - 1)) for p, d, s in zip(each(0, 2), dilation, kernel, strict=True))
    outputs = draw(st.integers(1, 3))
    if transposed:
        extra = tuple(min(1, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        return Geometry((4, outputs, *kernel), stride, padding, dilation, groups, True, extra)
    if set(stride) == {1}:
        padding = draw(st.sampled_from([padding, "same", "valid"]))
    return Geometry((outputs * groups, 4 // groups, *kernel), stride, padding, dilation, groups)


@given(geometry=geometries(), batch=st.integers(1, 3), bias=st.booleans())
@settings(max_examples=15, deadline=None)  # each is compiled
def test_one_by_one_equals_the_definition_for_every_geometry_and_batch(geometry, batch, bias):
    torch.manual_seed(0)
    x = torch.randn(batch, 4, *SIZE[: len(geometry.stride)], dtype=torch.float64)
    pi = torch.rand(batch, 3, dtype=torch.float64)
    weights = torch.randn(3, *geometry.weight_shape, dtype=torch.float64)
    biases = torch.randn(3, geometry.out_channels, dtype=torch.float64) if bias else None
    y = WAYS["one by one"](x, pi, weights.flatten(1), biases, geometry)
    torch.testing.assert_close(y, defined(x, pi, weights, biases, geometry), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [0, 1, 2, 8])
@pytest.mark.parametrize("train", [True, False])
def test_the_chooser_names_a_way_that_covers_the_case(case, batch, train):
    x = torch.empty(batch, 4, *SIZE[: len(CASES[case].stride)])
    assert covered(choose(x, CASES[case], train), case, batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chooser", [choose_for_any_batch, choose_for_onnx])
def test_a_chooser_of_an_exported_graph_names_one_way_for_every_batch(case, chooser):
    axes = len(CASES[case].stride)
    (way,) = {chooser(torch.empty(batch, 4, *SIZE[:axes]), CASES[case]) for batch in (1, 2, 8)}
    assert all(covered(way, case, batch) for batch in (1, 2, 8))
    assert chooser is choose_for_any_batch or way != "grouped"


def test_a_1x1_keeps_channels_last():
    x = torch.randn(3, 4, 7, 8).contiguous(memory_format=torch.channels_last)
    y = WAYS["matmul"](x, torch.ones(3, 1), torch.randn(1, 24), None, CASES["1x1"])
    assert y.is_contiguous(memory_format=torch.channels_last)


@st.composite
def situations(draw):
    """A geometry of two axes and an input for it, in any layout."""
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        groups = channels
    kernel, stride, dilation, padding = (
        tuple(draw(st.integers(*ends)) for _ in range(2)) for ends in ((1, 3), (1, 3), (1, 2), (0, 2))
    )
    if draw(st.booleans()):
        kernel, padding, groups = (1, 1), (0, 0), 1
    geometry = Geometry(
        (groups * draw(st.integers(1, 60)), channels // groups, *kernel), stride, padding, dilation, groups
    )
    size = (draw(st.integers(5, 9)), draw(st.integers(5, 9)))
    return geometry, (draw(st.sampled_from((0, 1, 2, 9))), channels, *size)


LAYOUTS = {
    "nchw": lambda x: x,
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "gaps": lambda x: x.mT.repeat_interleave(2, dim=-1)[..., ::2].mT,
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations(), st.sampled_from(list(LAYOUTS)), st.booleans(), st.data())
def test_every_way_gives_the_values_gradients_and_layout_of_the_reference(case, layout, bias, data):
    geometry, shape = case
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64)).requires_grad_()
    pi = torch.softmax(torch.randn(shape[0], 3, dtype=torch.float64), dim=1).requires_grad_()
    bank = torch.randn(3, math.prod(geometry.weight_shape), dtype=torch.float64, requires_grad=True)
    biases = torch.randn(3, geometry.out_channels, dtype=torch.float64, requires_grad=True) if bias else None
    wanted = [t for t in (x, pi, bank, biases) if t is not None and data.draw(st.booleans())]

    rows = [WAYS["single"](x[b : b + 1], pi[b : b + 1], bank, biases, geometry) for b in range(shape[0])]
    reference = torch.cat(rows) if rows else WAYS["single"](x, pi, bank, biases, geometry)
    direction = torch.randn_like(reference)
    for way in WAYS:
        if way == "one by one" or not covers(way, x, geometry):
            continue
        y = WAYS[way](x, pi, bank, biases, geometry)
        torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
        if layout == "nhwc" and way != "grouped" and shape[1] > 1:
            assert y.is_contiguous(memory_format=torch.channels_last), way
        with torch.no_grad():
            torch.testing.assert_close(WAYS[way](x, pi, bank, biases, geometry), y, rtol=1e-12, atol=1e-12)
        if wanted and shape[0]:
            found, expected = (torch.autograd.grad(out, wanted, direction, retain_graph=True) for out in (y, reference))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


WIDE = {
    "each": (Geometry((20, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1), (10, 6, 9, 9)),
    "blocks": (Geometry((150, 6, 3, 3), (2, 1), (1, 1), (1, 1), 1), (10, 6, 7, 7)),
    "columns": (Geometry((150, 6, 3, 3), (1, 1), (1, 1), (1, 2), 1), (10, 6, 7, 7)),
    "packed": (Geometry((20, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1), (70, 6, 12, 11)),
    "products": (Geometry((300, 6, 1, 1), (2, 1), (0, 0), (1, 1), 1), (10, 6, 7, 7)),
    "fused": (Geometry((66, 34, 1, 2), (1, 2), (1, 1), (1, 2), 1), (2, 34, 7, 14)),
}
TILED_HERE = [way for way in WIDE if covers(way, torch.empty(WIDE[way][1]), WIDE[way][0])]
"""Without ``fused`` where its kernels cannot run, see test_fused.py; ``native`` is in test_native.py."""


def inputs(way, dtype=torch.float32):
    geometry, shape = WIDE[way]
    x, bank = torch.randn(shape), torch.randn(3, math.prod(geometry.weight_shape))
    tensors = (x, torch.softmax(torch.randn(shape[0], 3), 1), bank, torch.randn(3, geometry.out_channels))
    return [t.to(dtype).requires_grad_() for t in tensors], geometry


@pytest.mark.parametrize("way", TILED_HERE)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_several_tiles_of_channels_and_samples_make_one_whole(way, layout):
    tensors, geometry = inputs(way, torch.float64)
    y, reference = (WAYS[name](LAYOUTS[layout](tensors[0]), *tensors[1:], geometry) for name in (way, "grouped"))
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(out, tensors, direction) for out in (y, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", TILED_HERE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_are_one_node_of_a_compiled_graph_with_the_same_values_and_gradients(way, layout):
    tensors, geometry = inputs(way, torch.float64)
    x, *rest = tensors

    def run(x):
        return WAYS[way](LAYOUTS[layout](x), *rest, geometry)

    y, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(out, tensors, direction) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    engine, padding = way if way in ("fused", "packed") else "each", (0,) * 2 if way == "products" else (1,) * 2
    tile = tiles.Tiling(engine, 128, 8, *geometry[:2], padding, *geometry[3:5])
    torch.library.opcheck(torch.ops.dysurgery.tiled, (LAYOUTS[layout](x.detach()), *rest, *tile))


@pytest.mark.parametrize("way", ["matmul", "products"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_on_maps_of_few_positions_are_the_same(way, bias):
    torch.manual_seed(0)
    geometry = Geometry((300, 20, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    x, pi, bank = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 20, 3, 3), (3, 2), (2, 6000)))
    tensors = [x, pi, bank, *([torch.randn(2, 300, dtype=torch.float64)] if bias else [])]
    arguments = [t.requires_grad_() for t in tensors] + [None] * (not bias)
    y, reference = (WAYS[name](*arguments, geometry) for name in (way, "grouped"))
    assert y.is_contiguous()
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(out, tensors, direction) for out in (y, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", TILED_HERE)
def test_tiles_keep_no_mixed_kernels_for_the_backward_pass(way):
    tensors, geometry = inputs(way)
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        WAYS[way](*tensors, geometry)
    given = {t.untyped_storage().data_ptr() for t in tensors}
    assert set(kept) <= given


@pytest.mark.parametrize("way", TILED_HERE)
def test_tiles_under_autocast_compute_in_the_lower_precision_and_train_in_float32(way):
    tensors, geometry = inputs(way)
    # Triton's interpreter multiplies bfloat16 as if they were integers.
    lower = torch.float16 if way == "fused" else torch.bfloat16
    with torch.autocast("cpu", dtype=lower):
        y = WAYS[way](*tensors, geometry)
    assert y.dtype == lower
    torch.testing.assert_close(y.float(), WAYS["grouped"](*tensors, geometry), rtol=5e-2, atol=5e-1)
    y.float().square().mean().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("way", TILED_HERE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_activation_in_place_may_follow(way, layout):
    tensors, geometry = inputs(way)
    x, *rest = tensors
    y, reference = (WAYS[name](LAYOUTS[layout](x), *rest, geometry) for name in (way, "grouped"))
    found, expected = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y.relu_(), reference.relu()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("way", TILED_HERE)
def test_tiles_can_be_differentiated_twice(way):
    tensors, geometry = inputs(way, torch.float64)

    def penalty(name):
        y = WAYS[name](*tensors, geometry)
        gradients = torch.autograd.grad(y.square().sum(), tensors[:2], create_graph=True)
        return torch.autograd.grad(sum(g.square().mean() for g in gradients), tensors)

    for found, expected in zip(penalty(way), penalty("grouped"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_under_a_transform_plain_operations_are_taken():
    torch.manual_seed(0)
    geometry = Geometry((256, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    x, pi, bank = torch.randn(20, 64, 5, 5), torch.rand(20, 3), torch.randn(3, 256 * 64 * 9)
    assert choose(x, geometry) in TILED
    _, tangent = torch.func.jvp(lambda x: convolve(x, pi, bank, None, geometry), (x,), (x,))
    torch.testing.assert_close(tangent, convolve(x, pi, bank, None, geometry), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "batch", "channels_last", "way"),
    [
        (16, 64, False, "grouped"),
        (16, 8, True, "stacked"),
        (64, 64, False, "packed"),
        (64, 64, True, "packed"),
        (256, 64, False, "each"),
    ],
)
def test_dense_layers_run_as_so_few_convolutions_as_the_cache_allows(channels, batch, channels_last, way, monkeypatch):
    monkeypatch.setattr(native, "_native", None)  # as if there were no C compiler
    x = torch.empty(batch, channels, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    assert choose(x, Geometry((channels, channels, 3, 3), (1, 1), (1, 1), (1, 1), 1)) == way
