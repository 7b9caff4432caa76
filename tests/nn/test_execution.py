import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dysurgery.nn.execution import WAYS, Geometry, choose, choose_for_any_batch, choose_for_onnx

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


def covers(way, case, batch):
    """Whether this way may be used: ``single`` for one sample, ``matmul`` for a plain 1x1, others for any sample."""
    geometry = CASES[case]
    if way == "single":
        return batch <= 1
    if way == "matmul":
        plain = geometry.groups == 1 and geometry.padding != (1, 1) and not geometry.transposed
        return plain and set(geometry.weight_shape[2:]) == {1}
    return batch > 0


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
        if way != "one by one" and covers(way, case, batch)  # that is for inference: below
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
def test_the_chooser_names_a_way_that_covers_the_case(case, batch):
    x = torch.empty(batch, 4, *SIZE[: len(CASES[case].stride)])
    assert covers(choose(x, CASES[case]), case, batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chooser", [choose_for_any_batch, choose_for_onnx])
def test_a_chooser_of_an_exported_graph_names_one_way_for_every_batch(case, chooser):
    axes = len(CASES[case].stride)
    (way,) = {chooser(torch.empty(batch, 4, *SIZE[:axes]), CASES[case]) for batch in (1, 2, 8)}
    assert all(covers(way, case, batch) for batch in (1, 2, 8))
    assert chooser is choose_for_any_batch or way != "grouped"


def test_a_1x1_keeps_channels_last():
    x = torch.randn(3, 4, 7, 8).contiguous(memory_format=torch.channels_last)
    y = WAYS["matmul"](x, torch.ones(3, 1), torch.randn(1, 24), None, CASES["1x1"])
    assert y.is_contiguous(memory_format=torch.channels_last)
