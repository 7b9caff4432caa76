import pytest
import torch
from torch.nn import functional as F

from dysurgery.nn.execution import WAYS, Geometry, choose

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
    """Whether this way may be used: ``single`` for one sample, ``matmul`` for a plain 1x1, ``grouped`` for any two."""
    geometry = CASES[case]
    if way == "single":
        return batch <= 1
    if way == "matmul":
        plain = geometry.groups == 1 and geometry.padding != (1, 1) and not geometry.transposed
        return plain and set(geometry.weight_shape[2:]) == {1}
    return batch > 0


@pytest.mark.parametrize(
    ("way", "case", "batch"),
    [(way, case, batch) for way in WAYS for case in CASES for batch in (0, 1, 3) if covers(way, case, batch)],
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

    def convolution(x, weight, bias):
        padded = (geometry.padding, geometry.output_padding) if geometry.transposed else (geometry.padding,)
        rest = (geometry.groups, geometry.dilation) if geometry.transposed else (geometry.dilation, geometry.groups)
        function = getattr(F, f"conv_transpose{axes}d" if geometry.transposed else f"conv{axes}d")
        return function(x, weight, bias, geometry.stride, *padded, *rest)

    def defined():
        rows = [
            convolution(
                x[b : b + 1],
                torch.tensordot(pi[b], weights, 1),
                pi[b] @ biases if bias else None,
            )
            for b in range(batch)
        ]
        return torch.cat(rows) if rows else convolution(x, weights[0], None)

    y, reference = WAYS[way](x, pi, weights.view(k, -1), biases, geometry), defined()
    assert y.shape == reference.shape
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    if batch:
        direction = torch.randn_like(y)
        found, expected = (torch.autograd.grad(out, inputs, direction) for out in (y, reference))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [0, 1, 2, 8])
def test_the_chooser_names_a_way_that_covers_the_case(case, batch):
    x = torch.empty(batch, 4, *SIZE[: len(CASES[case].stride)])
    assert covers(choose(x, CASES[case]), case, batch)


def test_a_1x1_keeps_channels_last():
    x = torch.randn(3, 4, 7, 8).contiguous(memory_format=torch.channels_last)
    y = WAYS["matmul"](x, torch.ones(3, 1), torch.randn(1, 24), None, CASES["1x1"])
    assert y.is_contiguous(memory_format=torch.channels_last)
